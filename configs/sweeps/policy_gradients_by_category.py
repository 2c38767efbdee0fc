"""Claim: REINFORCE < REINFORCE with baseline < DDPO < LOOP with K = 2, 3, 4 on color, shape, texture, spatial and
numeracy.

Source: 003 Tables 1 and 2. Show: final reward per category, trained on the prompts of that category and scored for it
alone. Settings as in policy_gradients.py.
"""

BASELINE = "algorithm=ddpo"
CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy")
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
        {
            "panel": category,
            "name": name,
            "config": f"../papers/loop.py:model=mini,{method}",
            "prompts.category": category,
            "reward.parts": category,
        }
        for category in CATEGORIES
        for name, method in METHODS.items()
    ]
