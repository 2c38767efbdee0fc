"""Claim: timestep weighting and hard-mined replay each help, both together most; 2 to 6 times fewer reward queries.

Source: "Selective Timestep Weighting" (anonymous), Fig. 7a, 7b. Show: gains over the untrained model and queries to
DDPO's final reward, on four rewards, for the four combinations.
"""

BASELINE = "neither"
SEEDS = 10
DIFFERENCE = 0.5
REWARDS = {
    "jpeg_compressibility": "",
    "aesthetic": "",
    "jpeg_incompressibility": "",
    "mini_verifier": ",prompts.category=color,prompts.count=8",
}
COMBINATIONS = {
    "neither": "weighting=uniform,replay=none",
    "replay": "weighting=uniform,replay=hard",
    "weighting": "weighting=latent_change_squared,replay=none",
    "both": "weighting=latent_change_squared,replay=hard",
}


def runs():
    return [
        {
            "panel": reward,
            "name": name,
            "config": f"../papers/selective_timestep.py:model=mini,reward={reward},{combination}{prompts}",
        }
        for reward, prompts in REWARDS.items()
        for name, combination in COMBINATIONS.items()
    ]
