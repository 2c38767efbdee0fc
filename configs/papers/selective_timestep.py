"""Timestep weighting and replay on DDPO, DPOK or B2-DiffuRL: "Selective Timestep Weighting" (anonymous), Tables 3, 4.

ours:       python -m ddpo_jax.main --config=configs/papers/selective_timestep.py
baseline:   ...selective_timestep.py:weighting=uniform,replay=none
others:     ...selective_timestep.py:algorithm=dpok    ...:algorithm=b2_diffurl
rewards:    ...:reward=jpeg_compressibility (here), jpeg_incompressibility, aesthetic
miniature:  ...:model=mini

Made for 4 GPUs as in the paper; on one, ``replay.k=16`` replays as many images as its 4 on each of 4.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # section 5
    config.num_epochs = 200  # 4000 queries, those of Tables 1 and 2; the images of A.5 are after 2000 to 9000
    config.sample.num_steps = 20  # Table 3: T
    config.sample.eta = 1.0  # Table 3: eta of DDIM
    config.sample.guidance_scale = 5.0  # Table 3: w
    config.sample.batch_size = 20  # Table 3: 5 samples per GPU and epoch on 4 GPUs
    config.sample.num_batches_per_epoch = 1
    config.train.batch_size = 4  # Table 3: effective batch size G over all GPUs
    config.train.learning_rate = 3e-5  # Table 3: AdamW
    config.train.weight_decay = 1e-4
    config.train.adam_b1, config.train.adam_b2 = 0.9, 0.999
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 4  # section 5
    config.train.adv_clip_max = 5.0  # not in the paper; in D3PO's public code, whose hyperparameters A.1 takes
    config.train.clip_range = 1e-4  # not in the paper; that of Black et al. 2023 and of D3PO (A.1)
    config.replay.k = 4  # Table 4: per GPU
    config.replay.history = 3  # Table 4
    config.prompts.samples_per_prompt = 1  # prompts are drawn for each sample, as by Black et al. 2023
    choose(config, "weighting", "latent_change_squared")  # Table 4: w(t)
    choose(config, "replay", "hard")  # section 4.3
    choose(config, "reward", "jpeg_compressibility")
    choose(config, "prompts", "animals")  # A.2

    with_choices(config, model)
    if on_miniature(config, images=20, update=4):
        config.replay.k = 16  # 4 x 4 of 20 images, on one device
    choose_members(config, members)
    if config.algorithm.name == "dpok":
        config.algorithm.reward_weight = 1000.0  # the public code's, for many prompts
        config.algorithm.kl_coef = 0.01
    if config.algorithm.name == "b2_diffurl":
        config.prompts.samples_per_prompt = 4  # branches of a root; not in the paper
    return with_choices(config, options)
