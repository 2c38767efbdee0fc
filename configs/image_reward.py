"""DDPO for ImageReward, a BLIP that was trained on people's ratings. It has no miniature: the network is the full one.

command:   python -m ddpo_jax.main --config=configs/image_reward.py
weights:   ddpo_jax weights image_reward bert_vocabulary (1.8 GB). Downloaded at the first use; for a machine without
           internet add --weights-dir=DIR there and --config.reward.weights_dir=DIR here
run time:  not run at full size here: no accelerator
expect:    not measured yet. The untrained Stable Diffusion 1.5 averages 0.48 on the papers' 45 animals

Choices follow a colon, such as configs/image_reward.py:reward.dtype=bfloat16,reward.device=host
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "image_reward")
    choose(config, "weighting", "latent_change_squared")
    config.prompts.samples_per_prompt = 2  # more prompts in an epoch, less chance in its mean reward
    config.algorithm.min_count = 4  # so a prompt's own statistics count from its second draw on
    return with_choices(config, arg)
