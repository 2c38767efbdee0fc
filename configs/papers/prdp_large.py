"""Deng et al. 2024, arXiv:2402.08714, large scale: PRDP on more than 100 000 prompts, where DDPO becomes unstable.

PRDP:       python -m ddpo_jax.main --config=configs/papers/prdp_large.py:prompts.path=FILE
DDPO:       ...prdp_large.py:algorithm=ddpo,prompts.path=FILE
miniature:  ...:model=mini (64 images, 8 prompts x 8, of its 112 896 prompts; verifier as the reward)

FILE has one prompt a line: those of the training set of HPDv2 in the paper (section 4.1). The multi-reward setup of the
same section has the training prompts of Pick-a-Pic v1 and
...:reward=weighted,reward.rewards='pickscore=10,hps=2,aesthetic=0.05',reward.options='pickscore.scale=0.01,hps.version=v2'
(PickScore on the scale of the paper's Table 1). For what the text leaves open see ``prdp.py``.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import (
    MIN_COUNT_ON_MANY,
    choose_members,
    learning_rate,
    on_miniature,
    prdp_beta,
    prdp_rate,
    split,
)


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "CompVis/stable-diffusion-v1-4"
    config.num_epochs = 1000
    config.sample.num_steps = 50  # DDPM
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 32
    config.sample.num_batches_per_epoch = 16  # 64 prompts x 8 images
    config.prompts.samples_per_prompt = 8
    config.train.batch_size = 512
    config.train.num_inner_epochs = 4
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 0
    config.train.clip_range = 1e-4
    choose(config, "algorithm", "prdp")
    choose(config, "reward", "aesthetic")
    choose(config, "prompts", "file")

    with_choices(config, model)
    mini = on_miniature(config, images=64, update=64)
    if mini:
        choose(config, "reward", "mini_verifier")
        config.prompts.split = "large"
    choose_members(config, members, min_count=MIN_COUNT_ON_MANY)
    if mini:  # see prdp.py
        rate = prdp_rate if config.algorithm.name == "prdp" else learning_rate
        config.train.learning_rate = rate(16, config.reward.name)
    if config.algorithm.name == "prdp":
        prdp_beta(config)
    else:
        config.train.num_inner_epochs = 1
        config.train.batch_size = config.sample.batch_size * config.sample.num_batches_per_epoch // 4
    return with_choices(config, options)
