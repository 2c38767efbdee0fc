"""Claim: DDPO beats RWR and sparse RWR; importance sampling beats the score function.

Source: Black et al. 2023, Fig. 4 (section 6.1); Gao et al. 2025, section 4.2. Show: curves. One learning rate and one
sampler for all; SF makes one update of an epoch, as it must, the others four.
"""

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5


def runs():
    return [
        {
            "panel": reward,
            "name": algorithm,
            "config": f"../papers/{file}.py:model=mini,reward={reward},algorithm={algorithm}",
        }
        for reward in ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic")
        for algorithm, file in (("ddpo", "ddpo"), ("ddpo_sf", "ddpo"), ("rwr", "rwr"), ("rwr_sparse", "rwr"))
    ]
