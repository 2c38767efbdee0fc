"""The prompt sets of the miniature's world (``ddpo_jax.mini.world`` has the grammar, the split and the sizes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.mini import world
from ddpo_jax.prompts import PromptFn, draw

SPLITS = {"training": "train", "novel": "novel", "large": ""}  # ours -> that of ``world.prompts``
CATEGORIES = ("all", "color", "shape", "texture", "spatial", "numeracy")


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "split": "training",  # training; novel: combinations that no training prompt has; large: over 100 000
            "category": "all",  # all, or one ability: color, shape, texture, spatial, numeracy
            "count": 0,  # how many prompts of the set are used, the same ones in every run; 0 = all of them
        }
    )


def prompts(split: str, category: str, count: int = 0) -> Sequence[str]:
    """The prompts of a set, or ``count`` of them that are spread over it by a fixed shuffle.

    Raises:
      InputError: one line for each option that names no set.
    """
    faults = []
    if split not in SPLITS:
        faults.append(f"prompts.split: received {split!r}; it must be one of {', '.join(SPLITS)}; use training")
    if category not in CATEGORIES:
        faults.append(f"prompts.category: received {category!r}; it must be one of {', '.join(CATEGORIES)}; use all")
    if not faults and split == "large" and category != "all":
        faults.append(f"prompts.category: received {category!r}; split 'large' is one set; use all, or split=training")
    if count < 0:
        faults.append(f"prompts.count: received {count}; it must be a whole number >= 0; use 0 for all")
    if faults:
        raise InputError("\n".join(faults))
    found: Sequence[str]
    if category != "all":
        found = world.prompts(category, SPLITS[split])
    else:
        sets = {"training": world.training_prompts, "novel": world.novel_prompts, "large": world.large_prompts}
        found = sets[split]()
    if count > len(found):
        raise InputError(f"prompts.count: received {count}; the set has {len(found)} prompts; use at most that")
    if count:
        found = [found[int(index)] for index in np.random.default_rng(0).permutation(len(found))[:count]]
    return found


def make(config: ConfigDict) -> PromptFn:
    """Draws captions of the world; metadata ``{"split": ..., "category": ...}``."""
    captions = prompts(config.split, config.category, config.count)
    metadata = {"split": config.split, "category": config.category}

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, Any]]]:
        return [captions[int(index)] for index in draw(rng, len(captions), n)], [dict(metadata) for _ in range(n)]

    return source
