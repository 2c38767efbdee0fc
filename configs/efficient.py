"""The most from a reward query: DDPO with an update after each pair of images, squared latent change, all steps.

command:   python -m ddpo_jax.main --config=configs/efficient.py:model=mini
           ...efficient.py     Stable Diffusion, on which it was not tried: docs/efficient.md
run time:  on the miniature 200 epochs of 2 images: 75 to 105 s on one thread of a busy core
expect:    on the miniature what DDPO gains from 1536 queries after 131 to 155 (five seeds, three rewards), and
           over-optimised pictures after 400: docs/efficient.md
rewards:   ...:reward=aesthetic (here), jpeg_compressibility, mini_verifier, a reward of your own
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split

PAIR = 2


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.sample.batch_size = config.train.batch_size = config.prompts.samples_per_prompt = PAIR
    config.sample.num_batches_per_epoch = 1
    config.sample.num_steps = 20
    config.train.learning_rate = 3e-5
    choose(config, "algorithm", "ddpo")
    choose(config, "weighting", "latent_change_squared")
    choose(config, "reward", "aesthetic")
    choose(config, "prompts", "animals")

    with_choices(config, model)
    on_miniature(config, images=PAIR, update=PAIR)
    choose_members(config, members)
    config.train.timestep_fraction = 1.0
    config.num_epochs = 200
    config.checkpoint.every = config.log.images_every = config.log.evaluate_every = 20
    return with_choices(config, options)
