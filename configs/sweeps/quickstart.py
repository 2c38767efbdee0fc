"""Claim: none of a paper; the four tasks of configs/ learn on the miniature, with every seed.

Source: DDPO and LOOP with the squared latent change, Black et al. 2023, Gupta et al. 2025, "Selective Timestep
Weighting" (anonymous), in the settings of configs/*.py. Show: the gain of every seed on equal prompts and noise, and
what it cost in CLIP score and verifier. One device, so that it does not depend on the machine's cores.
"""

BASELINE = "task"
SEEDS = 5


def runs():
    return [
        {"panel": task, "name": "task", "config": f"../{task}.py:model=mini", "mesh.data": 1}
        for task in ("aesthetic", "compressibility", "incompressibility", "alignment")
    ]
