"""Rewards by name, with options in brackets where they need some: ``aesthetic,clip_score[scale=100]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpo_jax.config import keys, with_choices
from ddpo_jax.config.override import override, unknown_key
from ddpo_jax.config.resolve import resolve
from ddpo_jax.errors import InputError

Chosen = dict[str, tuple[ConfigDict, Any]]


def choose_rewards(config: ConfigDict, text: str, options: Sequence[tuple[str, str]] = ()) -> Chosen:
    """The ``reward`` section and the member of each reward in ``text``, by what stands there; nothing is loaded.

    Args:
      config: what else the rewards depend on, such as the model.
      text: ``name`` or ``name[option=value,...]``, with commas.
      options: (``reward.key``, value) for every reward that has such a key; brackets have the last word.

    Raises:
      InputError: there is no such reward, or none with such an option, or a value is wrong.
    """
    sections: dict[str, ConfigDict] = {}
    known: set[str] = set()
    for item in keys.split(text):
        name, bracket, inside = item.partition("[")
        if bracket and not inside.endswith("]"):
            raise InputError(f"rewards: received {item!r}; it must be name or name[option=value,...]")
        section = with_choices(ConfigDict(config), f"reward={name}")
        known |= keys.flatten(section).keys()
        override(section, [option for option in options if option[0] in keys.flatten(section)])
        own = keys.split(inside.removesuffix("]"))
        sections[item] = with_choices(section, ",".join(f"reward.{option}" for option in own))
    if not sections:
        raise InputError(f"rewards: received {text!r}; it must name a reward; use jpeg_compressibility")
    for key, _ in options:
        if key not in known:
            raise InputError(unknown_key(section, key, sorted(known)))
    resolved = {item: resolve(section, jax.default_backend(), jax.device_count()) for item, section in sections.items()}
    return {item: (section.reward, members.reward) for item, (section, members) in resolved.items()}
