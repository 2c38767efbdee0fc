"""Claim: what was learned generalises to novel prompts, and prompt adherence is kept.

Source: "Selective Timestep Weighting" (anonymous), Tables 1 and 2. Show: after equal queries, the reward and the
miniature CLIP's score on the novel split, against the untrained model; DDPO and DDPO with weighting and replay.
"""

BASELINE = "ddpo"
SEEDS = 5
EVALUATE = {"prompts": "novel", "samples-per-prompt": "10", "rewards": "{reward},clip_score,mini_verifier"}


def runs():
    return [
        {
            "panel": reward,
            "name": name,
            "config": f"../papers/selective_timestep.py:model=mini,reward={reward},{choices}",
        }
        for reward in ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic")
        for name, choices in (
            ("ddpo", "weighting=uniform,replay=none"),
            ("ours", "weighting=latent_change_squared,replay=hard"),
        )
    ]
