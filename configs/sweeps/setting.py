"""Claim: none. Which learning rate suits the miniature is chosen here, on DDPO without additions, before comparisons.

Source: DDPO as in "Selective Timestep Weighting" (anonymous), Tables 3 and 4. Show: the gain of the final policies.
Rank 8 and no guidance are the miniature's own; the rule of ddpo_jax/config/presets.py has the rate for updates of 64
images, of which updates of 4 images take a quarter. Every method of a comparison then shares it.
"""

import math

from ddpo_jax.config.presets import AT_IMAGES

BASELINE = "rate_0.003"
SEEDS = 2
REWARDS = {
    "jpeg_compressibility": "",
    "aesthetic": "",
    "jpeg_incompressibility": "",
    "mini_verifier": ",prompts.category=color,prompts.count=8",
}


def runs():
    base = "../papers/selective_timestep.py:model=mini,weighting=uniform,replay=none"
    return [
        {
            "panel": reward,
            "name": f"rate_{rate}",
            "config": f"{base},reward={reward}{prompts}",
            "train.learning_rate": rate * math.sqrt(4 / AT_IMAGES),
        }
        for reward, prompts in REWARDS.items()
        for rate in (0.9e-3, 3e-3, 9e-3)
    ]
