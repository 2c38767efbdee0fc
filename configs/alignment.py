"""LOOP for images that show what the prompt says, as the miniature's verifier sees it (share of the caption's facts).

command:   python -m ddpo_jax.main --config=configs/alignment.py
run time:  40 epochs of 128 images of 3.2 s each on 2 quiet cores, after some 30 s of compilation
expect:    no rise yet on the miniature: 0.78 in the first five epochs, 0.78 in the last (one seed); most prompts are
           drawn right from the start, and two objects in relation, which have room, are not learnt in so few queries

LOOP rather than DDPO: most prompts are drawn right most of the time, and a z-score blows their rare failures up.
Choices follow a colon, such as configs/alignment.py:algorithm=ddpo,train.learning_rate=1e-4
"""

from ml_collections import ConfigDict

from ddpo_jax.config import choose, default_config, with_choices


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    choose(config, "reward", "mini_verifier")
    choose(config, "algorithm", "loop")
    choose(config, "weighting", "latent_change_squared")
    config.num_epochs = 40
    config.prompts.samples_per_prompt = 4
    config.train.learning_rate = 5e-5  # at higher rates the miniature forgets faster than it learns
    return with_choices(config, arg)
