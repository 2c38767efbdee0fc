"""Claim: hard-mining beats random replay, repeating the current epoch, and a larger learning rate.

Source: "Selective Timestep Weighting" (anonymous), Fig. 7d, Fig. 9 (A.3). Show: the ranking by queries to the final
reward without replay. Uniform weighting. The larger rate is "proportional to how many more gradient steps we take"
(A.3): replay makes one update beside an epoch's 5, so 6 / 5.
"""

from ddpo_jax.config.presets import learning_rate

BASELINE = "none"
SEEDS = 5
DIFFERENCE = 0.5


def runs():
    base = "../papers/selective_timestep.py:model=mini,weighting=uniform"
    found = []
    for reward in ("jpeg_compressibility", "aesthetic"):
        for rule in ("none", "hard", "random", "current_epoch"):
            found.append({"panel": reward, "name": rule, "config": f"{base},reward={reward},replay={rule}"})
        found.append(
            {
                "panel": reward,
                "name": "larger_learning_rate",
                "config": f"{base},reward={reward},replay=none",
                "train.learning_rate": learning_rate(4, reward) * 6 / 5,
            }
        )
    return found
