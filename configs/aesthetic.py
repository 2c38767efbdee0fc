"""DDPO for an aesthetic score: the miniature's own network on CPU, the LAION head on CLIP with Stable Diffusion.

command:   python -m ddpo_jax.main --config=configs/aesthetic.py
weights:   none on the miniature; else ddpo_jax weights clip_l14, and aesthetic_head by hand (ddpo_jax weights says from
           where). A folder of them is named by the variable DDPO_WEIGHTS
run time:  40 epochs of 128 images: 1 min 46 s on 2 quiet cores, with most programs compiled before
expect:    on the miniature 5.39 -> 7.30 (seed 0); on equal prompts and noise +1.93 to +2.04, 2.1 to 2.2 standard
           deviations of the untrained model's rewards (five seeds, one device); CLIP score falls by 0.33 on the way

Choices follow a colon, such as configs/aesthetic.py:algorithm=ddpo_sf,train.learning_rate=1e-4
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "aesthetic")
    choose(config, "weighting", "latent_change_squared")
    config.prompts.samples_per_prompt = 2  # more prompts in an epoch, less chance in its mean reward
    config.algorithm.min_count = 4  # so a prompt's own statistics count from its second draw on
    return with_choices(config, arg)
