"""Deng et al. 2024, arXiv:2402.08714, small scale: PRDP on 45 prompts, and the DDPO it is compared with. Section 4.1;
section 4.4 for the aesthetic reward.

PRDP:       python -m ddpo_jax.main --config=configs/papers/prdp.py
DDPO:       ...prdp.py:algorithm=ddpo
offline:    ...prdp.py:reward=hps,reward.version=v2,algorithm.refresh_every=0,algorithm.proximal=False
            (section 4.3, also with reward=pickscore: 51200 samples of the pretrained model)
miniature:  ...:model=mini (64 images, 4 prompts x 16)

With the aesthetic reward (here; section 4.4, the only one whose beta the paper gives): 250 epochs, prompts are the bare
names. With any other: 100 epochs, "A painting of a ...". The learning rate, the gradient updates per epoch and the clip
are not in the paper's text: here they are those of Black et al. 2023, and 4 updates on all images. For a reward without
a beta in the paper it is 25 deviations of that reward, see ``algorithms/prdp.py``.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, learning_rate, on_miniature, prdp_beta, prdp_rate, split


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "CompVis/stable-diffusion-v1-4"  # section 4.1
    config.num_epochs = 100
    config.sample.num_steps = 50  # section 4.1: DDPM, which is DDIM with eta = 1
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 32
    config.sample.num_batches_per_epoch = 16  # 32 prompts x 16 images
    config.prompts.samples_per_prompt = 16
    config.train.batch_size = 512  # Algorithm 1: each of its gradient updates is on all pairs
    config.train.num_inner_epochs = 4
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 0  # section 4.1: the whole UNet
    config.train.clip_range = 1e-4
    choose(config, "algorithm", "prdp")
    choose(config, "reward", "aesthetic")
    choose(config, "prompts", "animals")

    with_choices(config, model)
    mini = on_miniature(config, images=64, update=64)
    choose_members(config, members)
    if config.prompts.name == "animals":
        config.prompts.template = "{animal}" if config.reward.name == "aesthetic" else "A painting of a {animal}"
    if config.reward.name == "aesthetic" and not mini:
        config.num_epochs = 250
    if mini:  # DDPO makes 4 updates of 16 images
        rate = prdp_rate if config.algorithm.name == "prdp" else learning_rate
        config.train.learning_rate = rate(16, config.reward.name)
    if config.algorithm.name == "prdp":
        prdp_beta(config)
    else:  # Black et al. 2023: 4 updates on a quarter of the images each
        config.train.num_inner_epochs = 1
        config.train.batch_size = config.sample.batch_size * config.sample.num_batches_per_epoch // 4
    return with_choices(config, options)
