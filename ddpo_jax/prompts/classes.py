"""The classes of a data set in a sentence, such as the 1000 of ImageNet: one class a line of a text file.

A line may begin with a WordNet id and name synonyms with commas, as ImageNet's lists do: of
``n01440764 tench, Tinca tinca`` the class is "tench". Underscores are blanks. A class that is named twice counts once
(ImageNet has two cranes).
"""

from __future__ import annotations

import re

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.prompts import PromptFn, _text, draw

PLACE = "{class}"
_WORDNET_ID = re.compile(r"^n\d{8}\b[\s:,]*")


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "path": "",  # text file with one class a line, from the current folder
            "template": "a photo of a {class}",  # sentence; {class} is the name; "a" before it becomes "an"
        }
    )


def classes(path: str) -> list[str]:
    """The distinct class names of a file, in its order.

    Raises:
      InputError: in one line, why there are none.
    """
    found = []
    for number, line in _text.lines(path, "prompts.name=classes needs a text file with one class a line"):
        name = " ".join(_WORDNET_ID.sub("", _text.checked(path, number, line)).split(",")[0].replace("_", " ").split())
        if not name:
            raise InputError(f"{_text.refusal(path)}line {number} names no class: {line!r}; write its name")
        found.append(name)
    return list(dict.fromkeys(found))


def make(config: ConfigDict) -> PromptFn:
    """Draws classes; metadata ``{"class": name}``.

    Raises:
      InputError: there is no such file, or the template has no ``{class}``.
    """
    _text.check_template(config.template, PLACE, "a photo of a {class}")
    names, template = classes(config.path), config.template

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, str]]]:
        chosen = [names[index] for index in draw(rng, len(names), n)]
        return [_text.insert(template, PLACE, name) for name in chosen], [{"class": name} for name in chosen]

    return source
