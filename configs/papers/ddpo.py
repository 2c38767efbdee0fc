"""Black et al. 2023, arXiv:2305.13301: DDPO with importance sampling; with the score function. Section 5, appendix D.1.

DDPO_IS:    python -m ddpo_jax.main --config=configs/papers/ddpo.py
DDPO_SF:    ...ddpo.py:algorithm=ddpo_sf
rewards:    ...:reward=jpeg_compressibility (here), jpeg_incompressibility, aesthetic
miniature:  ...:model=mini (64 images in place of 256, in as many updates)

Prompts are the 45 animals of the aesthetic experiments. For the JPEG rewards the paper draws from the 398 animals of
ImageNet, whose names are not in this package: ...:prompts=classes,prompts.path=FILE with them, a line each.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "CompVis/stable-diffusion-v1-4"  # appendix D: only the UNet is trained, all of it
    config.num_epochs = 100  # 25 600 queries: the length of the curves of appendix C
    config.sample.num_steps = 50
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 32
    config.sample.num_batches_per_epoch = 8  # D.1: 256 samples per iteration
    config.train.batch_size = 64  # D.1: 4 minibatches, 4 updates
    config.train.learning_rate = 1e-5  # AdamW
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 0
    config.train.clip_range = 1e-4
    config.prompts.samples_per_prompt = 1  # a prompt for each sample
    choose(config, "reward", "jpeg_compressibility")
    choose(config, "prompts", "animals")

    with_choices(config, model)
    on_miniature(config, images=64, update=16)
    choose_members(config, members)
    if config.algorithm.name == "ddpo_sf":  # D.1: one update from all samples, at the same learning rate
        config.train.batch_size = config.sample.batch_size * config.sample.num_batches_per_epoch
    return with_choices(config, options)
