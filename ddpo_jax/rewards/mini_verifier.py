"""How much of the caption an image of the miniature's world shows, in [0, 1], by the miniature's verifier.

The categories are those of T2I-CompBench (arXiv:2307.06350): color, shape, texture, spatial, numeracy. All prompts must
be sentences of the miniature's grammar (``ddpo_jax.mini.grammar``). The score says nothing about other images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.mini.verifier import Verifier
from ddpo_jax.rewards._shared import clip as _clip

MINIATURE_ONLY = True  # refused with any other model, before one is loaded
CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy")


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.parts = (
        "all"  # what is scored: all that applies to the prompt, or one of color, shape, texture, spatial, numeracy
    )
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; its parts are the categories, NaN where a prompt says nothing of one.

    Raises:
      InputError: an unknown category; the verifier's weights are missing. When called: a prompt outside the grammar, or
        one that says nothing of the chosen category.
    """
    choices = ("all", *CATEGORIES)
    if config.parts not in choices:
        raise InputError(f"reward.parts={config.parts!r}: must be one of {', '.join(choices)}")
    chosen = config.parts
    verifier = Verifier.from_folder(_clip.embedded("verifier", "reward.name", "mini_verifier"))

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        scores, parts = verifier(images, prompts)
        if chosen != "all":
            scores = parts[chosen]
            silent = np.flatnonzero(np.isnan(scores))
            if silent.size:
                raise InputError(
                    f"reward.parts={chosen!r}: prompt {prompts[silent[0]]!r} says nothing of it; "
                    "use the prompts of that category, or reward.parts=all"
                )
        return np.asarray(scores, np.float32), {name: np.asarray(part, np.float32) for name, part in parts.items()}

    return reward
