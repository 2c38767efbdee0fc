"""Gao et al. 2025: DDPO_ISKL, and the DDPO_IS and DDPO_SF of the same paper. Table 1.

DDPO_ISKL:  python -m ddpo_jax.main --config=configs/papers/ddpo_iskl.py
DDPO_IS:    ...ddpo_iskl.py:algorithm=ddpo
DDPO_SF:    ...ddpo_iskl.py:algorithm=ddpo_sf
collapse:   ...ddpo_iskl.py:train.learning_rate=3e-3 (section 4.1: "bad hyperparameters", ten times the rate)
rewards:    ...:reward=jpeg_compressibility (here), jpeg_incompressibility, aesthetic
miniature:  ...:model=mini (16 images)

Table 1 has a batch of 16 and, for IS and ISKL, 8 samples per iteration: a minibatch is then all samples. Its 4 updates
of SF on the same samples lack an importance ratio that would correct for the earlier ones: a run warns of it. Correct
is train.num_inner_epochs=1.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # the paper names no version
    config.num_epochs = 200  # not in the paper
    config.sample.num_steps = 50  # Table 1: T
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0  # Table 1: w
    config.sample.batch_size = 8  # Table 1: samples per iteration; 16 for SF
    config.sample.num_batches_per_epoch = 1
    config.train.batch_size = 8
    config.train.num_inner_epochs = 2  # Table 1: gradient updates per iteration
    config.train.timestep_fraction = 1.0  # Algorithms 3 to 5: all steps; ISKL's penalty needs them
    config.train.learning_rate = 3e-4  # Table 1
    config.train.weight_decay = 1e-4
    config.train.adam_b1, config.train.adam_b2, config.train.adam_eps = 0.9, 0.999, 1e-8
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 4  # not in the paper
    config.train.clip_range = 1e-4
    config.prompts.samples_per_prompt = 1
    choose(config, "algorithm", "ddpo_iskl")
    choose(config, "reward", "jpeg_compressibility")
    choose(config, "prompts", "animals")

    with_choices(config, model)
    on_miniature(config, images=16, update=16)
    choose_members(config, members)
    if config.algorithm.name == "ddpo_sf":
        config.sample.batch_size = config.train.batch_size = 16
        config.train.num_inner_epochs = 4  # Table 1
    return with_choices(config, options)
