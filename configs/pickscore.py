"""DDPO for PickScore, a CLIP H/14 trained on people's choices; on the miniature its own CLIP stands in.

command:   python -m ddpo_jax.main --config=configs/pickscore.py
weights:   ddpo_jax weights pickscore clip_tokenizer (3.9 GB; none on the miniature). Downloaded at the first use; for a
           machine without internet add --weights-dir=DIR there and --config.reward.weights_dir=DIR here
run time:  not run at full size here: no accelerator. On the miniature as configs/aesthetic.py
expect:    not measured yet. The untrained Stable Diffusion 1.4 averages 21.79 on the papers' 45 animals

Choices follow a colon, such as configs/pickscore.py:reward.scale=0.01,reward.device=host
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "pickscore")
    choose(config, "weighting", "latent_change_squared")
    config.prompts.samples_per_prompt = 2  # more prompts in an epoch, less chance in its mean reward
    config.algorithm.min_count = 4  # so a prompt's own statistics count from its second draw on
    return with_choices(config, arg)
