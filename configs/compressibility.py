"""DDPO for small JPEG files: minus the size in kB (quality 95).

command:   python -m ddpo_jax.main --config=configs/compressibility.py
run time:  40 epochs of 128 images: as configs/aesthetic.py, about 2 minutes on 2 quiet cores
expect:    on the miniature -1.087 -> -0.757 (seed 0, one device); on equal prompts and noise +0.33 to +0.36, 2.5 to 2.7
           standard deviations of the untrained model's rewards (five seeds); the reward asks for nothing else, and
           little is left in the pictures by then: CLIP score -0.69 (after 20 epochs +0.23 for -0.37)

Choices follow a colon, such as configs/compressibility.py:algorithm=ddpo_sf,train.learning_rate=1e-4
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "jpeg_compressibility")
    choose(config, "weighting", "latent_change_squared")
    config.prompts.samples_per_prompt = 2  # more prompts in an epoch, less chance in its mean reward
    config.algorithm.min_count = 4  # so a prompt's own statistics count from its second draw on
    return with_choices(config, arg)
