"""Claim: REINFORCE < REINFORCE with baseline < DDPO < LOOP with K = 2, 3, 4, here on all verifier categories together
and on the aesthetic score.

Source: Gupta et al. 2025, Tables 1 to 3, Fig. 2 and 3. Show: final reward, and queries to DDPO's; and the reward of the
final policies on equal prompts and noise, since an epoch of 48 images sees few prompts, the fewer the larger K. One
learning rate for all; REINFORCE makes one update of an epoch, as it must, the others two. Per category:
policy_gradients_by_category.py.
"""

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5
EVALUATE = {"prompts": "training", "samples-per-prompt": "10", "rewards": "{reward}"}
REWARDS = ("mini_verifier", "aesthetic")
METHODS = {
    "reinforce": "algorithm=reinforce",
    "reinforce_bc": "algorithm=reinforce_bc",
    "ddpo": "algorithm=ddpo",
    "loop_2": "algorithm=loop,prompts.samples_per_prompt=2",
    "loop_3": "algorithm=loop,prompts.samples_per_prompt=3",
    "loop_4": "algorithm=loop,prompts.samples_per_prompt=4",
}


def runs():
    return [
        {"panel": reward, "name": name, "config": f"../papers/loop.py:model=mini,reward={reward},{method}"}
        for reward in REWARDS
        for name, method in METHODS.items()
    ]
