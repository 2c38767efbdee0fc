"""Reward-weighted regression, and the sparse one: Black et al. 2023, arXiv:2305.13301, section 4.1; Gao et al. 2025,
sections 3.1 and 3.2.

RWR:        python -m ddpo_jax.main --config=configs/papers/rwr.py
sparse:     ...rwr.py:algorithm=rwr_sparse
one round:  ...rwr.py:algorithm.refresh_every=0 (all samples from the pretrained model)
miniature:  ...:model=mini (64 images in place of 256)

Sampler, optimizer and images are those of ``ddpo.py``, with which Black et al. compare. Their weights are a softmax
over all samples for the JPEG rewards, and within a prompt for others, which here takes 4 samples of a prompt. The
miniature's rewards have another scale (JPEG sizes 0.1 kB apart): there the temperature is in deviations of the reward,
1.5 of them, so that a tenth of the samples carries the weight, as many as sparse RWR keeps.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.presets import choose_members, on_miniature, split

JPEG = ("jpeg_compressibility", "jpeg_incompressibility")


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "CompVis/stable-diffusion-v1-4"
    config.num_epochs = 100
    config.sample.num_steps = 50
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 32
    config.sample.num_batches_per_epoch = 8
    config.train.batch_size = 64
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.lora_rank = 0
    config.train.clip_range = 1e-4  # not read
    config.prompts.samples_per_prompt = 1
    choose(config, "reward", "jpeg_compressibility")
    choose(config, "prompts", "animals")
    choose(config, "algorithm", "rwr")

    with_choices(config, model)
    mini = on_miniature(config, images=64, update=16)
    choose_members(config, members)
    if config.algorithm.name == "rwr":
        config.algorithm.temperature = 1.5 if mini else 0.2  # the public code's; the papers do not say
        config.algorithm.reward_unit = "deviation" if mini else "reward"
        if config.reward.name not in JPEG:
            config.algorithm.softmax_over = "prompt"
            config.prompts.samples_per_prompt = 4
    if config.algorithm.name == "rwr_sparse":
        config.algorithm.threshold_by = "percentile"
        config.algorithm.threshold = 90.0
    return with_choices(config, options)
