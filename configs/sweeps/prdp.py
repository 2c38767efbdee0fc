"""Claim: PRDP matches DDPO on few prompts and stays stable on more than 100 000, where DDPO degrades; its KL keeps
prompt adherence where the reward is over-optimised.

Source: Deng et al. 2024, Tables 1 and 2, section 4.4 and Fig. 8. Show: final rewards of both settings (small, large);
prompt adherence by the miniature CLIP's score and verifier after training on the aesthetic reward for 2.5 times as long
(250 epochs to 100 in the paper). Equal reward queries; each method at the rate of its
preset. The verifier hardly moves in so few queries, so many prompts are also tried with the aesthetic score.
"""

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5
EVALUATE = {"prompts": "training", "samples-per-prompt": "10", "rewards": "{reward},clip_score,mini_verifier"}


def runs():
    found = []
    for algorithm in ("ddpo", "prdp"):
        small = f"../papers/prdp.py:model=mini,algorithm={algorithm}"
        large = f"../papers/prdp_large.py:model=mini,algorithm={algorithm}"
        found += [
            {"panel": "small", "name": algorithm, "config": f"{small},reward=mini_verifier"},
            {"panel": "large", "name": algorithm, "config": large},
            {"panel": "large_aesthetic", "name": algorithm, "config": f"{large},reward=aesthetic"},
            {"panel": "overoptimization", "name": algorithm, "config": f"{small},reward=aesthetic", "num_epochs": 60},
        ]
    return sorted(found, key=lambda run: run["panel"])
