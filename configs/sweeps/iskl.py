"""Claim: importance sampling is steadier than the score function, ISKL avoids collapse, ten times the learning rate
collapses.

Source: Gao et al. 2025, Fig. 3 to 5, section 5. Show: curves, and the miniature CLIP's score and verifier for prompt
adherence. Not the paper's: ddpo_iskl_bounded, whose penalty has a clip and a baseline.
"""

from ddpo_jax.config.presets import learning_rate

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5
EVALUATE = {"prompts": "training", "samples-per-prompt": "10", "rewards": "{reward},clip_score,mini_verifier"}


def runs():
    found = []
    for reward in ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic"):
        methods = {
            "ddpo_sf": ("ddpo_sf", {}),
            "ddpo": ("ddpo", {}),
            "ddpo_iskl": ("ddpo_iskl", {}),
            "ddpo_iskl_10x": ("ddpo_iskl", {"train.learning_rate": 10 * learning_rate(16, reward)}),
            "ddpo_iskl_bounded": ("ddpo_iskl", {"algorithm.penalty_clip": True, "algorithm.penalty_baseline": True}),
        }
        for name, (algorithm, keys) in methods.items():
            config = f"../papers/ddpo_iskl.py:model=mini,reward={reward},algorithm={algorithm}"
            found.append({"panel": reward, "name": name, "config": config} | keys)
    return found
