"""A person teaches the model: every epoch's images wait in a web page until they are rated.

command:   python -m ddpo_jax.main --config=configs/human.py
           and open http://127.0.0.1:8001 in a browser

Choices follow a colon: configs/human.py:reward.mode=pairs asks which of two images is better; for a phone or colleagues
on the same network add reward.host=0.0.0.0,reward.token=SECRET and open the address that the log shows.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "human")
    choose(config, "algorithm", "loop")
    choose(config, "weighting", "latent_change_squared")
    choose(config, "prompts", "mini")
    config.num_epochs = 10
    config.sample.batch_size = 16
    config.sample.num_batches_per_epoch = 1
    config.prompts.category = "color"
    config.prompts.count = 4
    config.prompts.samples_per_prompt = 4
    return with_choices(config, arg)
