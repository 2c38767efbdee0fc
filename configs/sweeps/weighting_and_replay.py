"""Claim: timestep weighting and hard-mined replay each help, both together most; 2 to 6 times fewer reward queries.

Source: "Selective Timestep Weighting" (anonymous), Fig. 7a, 7b. Show: queries to DDPO's final reward, on 2 rewards, for
the 4 combinations.
"""

BASELINE = "weighting=uniform,replay=none"
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
            "config": f"../papers/selective_timestep.py:model=mini,reward={reward},{combination}",
        }
        for reward in ("jpeg_compressibility", "aesthetic")
        for name, combination in COMBINATIONS.items()
    ]
