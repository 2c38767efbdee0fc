"""The animals of the papers in a sentence: 45 common ones for training, 45 others to test generalisation.

Source: Black et al. 2023 train on the first list and "Selective Timestep Weighting" (anonymous) tests on the second;
the latter prints both in its appendix A.2.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.prompts import PromptFn, _text, draw

FILES = {"training": "animals.txt", "novel": "animals_novel.txt"}
PLACE = "{animal}"


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "split": "training",  # training: the 45 common animals; novel: 45 that are not among them
            "template": "a {animal}",  # sentence; {animal} is the noun; "a" before it becomes "an" where it should
        }
    )


def animals(split: str) -> list[str]:
    """The 45 nouns of "training" or "novel", in the order of the papers."""
    return resources.files(__package__).joinpath(FILES[split]).read_text(encoding="utf-8").split()


def sentence(template: str, animal: str) -> str:
    """``template`` with the noun in it and the right article before it."""
    return _text.insert(template, PLACE, animal)


def make(config: ConfigDict) -> PromptFn:
    """Draws animals; metadata ``{"animal": noun}``.

    Raises:
      InputError: an unknown split, or a template without ``{animal}``.
    """
    if config.split not in FILES:
        raise InputError(f"prompts.split: received {config.split!r}; it must be one of training, novel; use training")
    _text.check_template(config.template, PLACE, "A painting of a {animal}")
    nouns, template = animals(config.split), config.template

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, str]]]:
        chosen = [nouns[index] for index in draw(rng, len(nouns), n)]
        return [sentence(template, noun) for noun in chosen], [{"animal": noun} for noun in chosen]

    return source
