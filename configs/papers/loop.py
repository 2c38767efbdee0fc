"""Gupta et al. 2025, arXiv:2503.00897: LOOP with K = 2, 3, 4, and what it is compared with: REINFORCE, REINFORCE with
baseline, DDPO. Section 6.

LOOP K=4:   python -m ddpo_jax.main --config=configs/papers/loop.py
LOOP K=3:   ...loop.py:prompts.samples_per_prompt=3
baselines:  ...loop.py:algorithm=ddpo    reinforce    reinforce_bc    (these draw a prompt for each sample)
miniature:  ...:model=mini (48 images in 2 updates: a number that 2, 3 and 4 divide), reward=mini_verifier
                (one category: prompts.category=color,reward.parts=color)

Made for 8 GPUs as in the paper.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split

GROUPED = ("loop", "rloo", "grpo")
ONE_UPDATE = ("reinforce", "reinforce_bc", "rloo", "ddpo_sf")  # the paper: samples "can only be used once"


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "stabilityai/stable-diffusion-2-base"  # section 5: Stable Diffusion v2
    config.num_epochs = 200  # not in the paper
    config.sample.num_steps = 50  # section 6: T
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0  # section 6
    config.sample.batch_size = 32  # section 6: 4 per GPU, 8 GPUs
    config.sample.num_batches_per_epoch = 4  # not in the paper; with it an epoch is 4 updates as in Black et al. 2023
    config.train.batch_size = 32  # section 6: 4 per GPU, 8 GPUs
    config.train.learning_rate = 1e-5  # section 6: AdamW, other parameters at their defaults
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 0  # section 5: the whole UNet
    config.train.clip_range = 1e-4  # section 6: epsilon
    config.prompts.samples_per_prompt = 4  # section 7.2: K = 2, 3, 4
    choose(config, "algorithm", "loop")
    choose(config, "reward", "aesthetic")  # Table 3
    choose(config, "prompts", "animals")

    with_choices(config, model)
    mini = on_miniature(config, images=48, update=24)
    if mini:
        choose(config, "reward", "mini_verifier")  # Tables 1 and 2
    choose_members(config, members)
    if config.algorithm.name not in GROUPED:
        config.prompts.samples_per_prompt = 1
    with_choices(config, options)
    if config.prompts.samples_per_prompt == 3 and not mini and "batch_size" not in options:
        config.sample.batch_size = config.train.batch_size = 24  # 4 per GPU holds one whole group of 3
    if config.algorithm.name in ONE_UPDATE and "train.batch_size" not in options:
        config.train.batch_size = config.sample.batch_size * config.sample.num_batches_per_epoch
    return config
