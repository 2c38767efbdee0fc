"""Claim: weighting and replay carry over to DPOK and B2-DiffuRL.

Source: "Selective Timestep Weighting" (anonymous), Fig. 7a. Show: queries to the final reward of each algorithm without
them, one comparison per algorithm.
"""

BASELINE = "plain"
SEEDS = 5
DIFFERENCE = 0.5


def runs():
    return [
        {
            "panel": algorithm,
            "name": name,
            "config": f"../papers/selective_timestep.py:model=mini,algorithm={algorithm},{choices}",
        }
        for algorithm in ("dpok", "b2_diffurl")
        for name, choices in (
            ("plain", "weighting=uniform,replay=none"),
            ("both", "weighting=latent_change_squared,replay=hard"),
        )
    ]
