"""PRDP for the mixture of rewards of its paper, 10 PickScore + 2 HPSv2 + 0.05 aesthetic (Deng et al. 2024).

command:   python -m ddpo_jax.main --config=configs/prdp_mixture.py
weights:   ddpo_jax weights pickscore hps_v2 clip_l14 clip_tokenizer, and aesthetic_head by hand (none on the miniature,
           whose CLIP and head stand in). A folder of them is named by the variable DDPO_WEIGHTS
run time:  not run at full size here: no accelerator
expect:    not measured yet; all three parts should rise, reward/pickscore, reward/hps and reward/aesthetic

PickScore is divided by 100, as in the paper. The sizes are this project's; those of the paper are in
configs/papers/prdp_large.py. Choices follow a colon, such as configs/prdp_mixture.py:reward.normalise=advantages;
the weights are then of standardised rewards, so add --config.reward.rewards=pickscore=1,hps=1,aesthetic=1
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "algorithm", "prdp")
    choose(config, "reward", "weighted")
    config.reward.rewards = "pickscore=10,hps=2,aesthetic=0.05"
    config.reward.options = "pickscore.scale=0.01,hps.version=v2"
    config.prompts.samples_per_prompt = 8
    config.train.num_inner_epochs = 4  # a regression may pass over an epoch's images several times
    config.train.learning_rate = 3e-4  # low, so that a pair's first step does not overshoot its target
    return with_choices(config, arg)
