"""Claim: the squared latent change is the best weighting; an early Gaussian beats a middle one, that a late one.

Source: "Selective Timestep Weighting" (anonymous), Fig. 7c. Show: the ranking by queries to the uniform weighting's
final reward. No replay. The measured weighting (advantage_variance) needs the table that ddpo_jax measure writes and is
not part of the figure.
"""

BASELINE = "uniform"
SEEDS = 5
DIFFERENCE = 0.5
SCHEMES = (
    "uniform",
    "ddim_std",
    "latent_change",
    "latent_change_squared",
    "gaussian_early",
    "gaussian_middle",
    "gaussian_late",
)


def runs():
    return [
        {
            "panel": reward,
            "name": scheme,
            "config": f"../papers/selective_timestep.py:model=mini,reward={reward},weighting={scheme},replay=none",
        }
        for reward in ("jpeg_compressibility", "aesthetic")
        for scheme in SCHEMES
    ]
