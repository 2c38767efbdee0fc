"""Claim: REINFORCE < REINFORCE with baseline < DDPO < LOOP with K = 2, 3, 4 on color, shape, texture, spatial and
numeracy.

Source: Gupta et al. 2025, Tables 1 and 2. Show: final reward per category, trained on prompts of that category and
scored for it alone; and of all categories together. Unlike in policy_gradients.py the miniature learns here, from what
is the same for all methods: few prompts, adapters at a high learning rate, no guidance, the squared latent change, 96
images an epoch. REINFORCE makes one update of them, as it must, the others two.
"""

BASELINE = "ddpo"
SEEDS = 5
DIFFERENCE = 0.5
PROMPTS = {"color": 4, "shape": 4, "texture": 4, "spatial": 4, "numeracy": 4, "all": 8}
METHODS = {
    "reinforce": "algorithm=reinforce,train.batch_size=96",
    "reinforce_bc": "algorithm=reinforce_bc,train.batch_size=96",
    "ddpo": "algorithm=ddpo,train.batch_size=48",
    "loop_2": "algorithm=loop,prompts.samples_per_prompt=2,train.batch_size=48",
    "loop_3": "algorithm=loop,prompts.samples_per_prompt=3,train.batch_size=48",
    "loop_4": "algorithm=loop,prompts.samples_per_prompt=4,train.batch_size=48",
}


def runs():
    return [
        {
            "panel": category,
            "name": name,
            "config": f"../papers/loop.py:model=mini,weighting=latent_change_squared,{method}",
            "num_epochs": 16,
            "prompts.category": category,
            "prompts.count": count,
            "reward.parts": category,
            "sample.batch_size": 96,
            "sample.guidance_scale": 1,
            "train.learning_rate": 3e-3,
            "train.lora_rank": 8,
        }
        for category, count in PROMPTS.items()
        for name, method in METHODS.items()
    ]
