"""LOOP for T2I-CompBench: where things are (reward=spatial), how many (numeracy), their colour, shape, texture (vqa).

command:   python -m ddpo_jax.main --config=configs/compbench.py (the miniature; its verifier is the detector)
           ...compbench.py:reward=numeracy
           ...compbench.py:model=stable-diffusion-v1-5/stable-diffusion-v1-5,prompts.path=DIR,reward=vqa
           DIR is examples/dataset of a copy of T2I-CompBench; for reward=spatial or numeracy add
           reward.detector=package.module:function or the URL of a server, see ddpo_jax/rewards/_shared/detect.py
weights:   of vqa alone, which has no miniature: ddpo_jax weights blip_vqa bert_vocabulary
run time:  not run at full size here: no accelerator. On the miniature as configs/alignment.py
expect:    not measured yet. The untrained Stable Diffusion 1.4 reaches 0.1246 (spatial), 0.4461 (numeracy), 0.3765
           (vqa, color)

vqa takes the color prompts; prompts.category=shape or texture takes others.
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices
from ddpo_jax.config.model import is_miniature
from ddpo_jax.config.presets import split

CATEGORIES = {"spatial": "spatial", "numeracy": "numeracy", "vqa": "color"}  # reward -> the benchmark's prompts for it


def get_config(arg: str = "") -> ConfigDict:
    model, members, options = split(arg)
    config = default_config()
    config.model = "mini"
    choose(config, "algorithm", "loop")
    choose(config, "weighting", "latent_change_squared")
    choose(config, "reward", "spatial")
    with_choices(config, model)
    choose(config, "prompts", "mini" if is_miniature(config.model) else "compbench")
    with_choices(config, members)
    if config.prompts.name in ("mini", "compbench") and config.reward.name in CATEGORIES:
        config.prompts.category = CATEGORIES[config.reward.name]
    config.prompts.samples_per_prompt = 8
    return with_choices(config, options)
