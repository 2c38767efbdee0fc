"""The prompt sets of the miniature's world (``ddpo_jax.mini.world`` has the grammar, the split and the sizes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

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
        }
    )


def prompts(split: str, category: str) -> Sequence[str]:
    """The prompts of a set.

    Raises:
      ValueError: one line for each option that names no set.
    """
    faults = []
    if split not in SPLITS:
        faults.append(f"prompts.split: received {split!r}; it must be one of {', '.join(SPLITS)}; use training")
    if category not in CATEGORIES:
        faults.append(f"prompts.category: received {category!r}; it must be one of {', '.join(CATEGORIES)}; use all")
    if not faults and split == "large" and category != "all":
        faults.append(f"prompts.category: received {category!r}; split 'large' is one set; use all, or split=training")
    if faults:
        raise ValueError("\n".join(faults))
    if category != "all":
        return world.prompts(category, SPLITS[split])
    return {"training": world.training_prompts, "novel": world.novel_prompts, "large": world.large_prompts}[split]()


def make(config: ConfigDict) -> PromptFn:
    """Draws captions of the world; metadata ``{"split": ..., "category": ...}``."""
    captions = prompts(config.split, config.category)
    metadata = {"split": config.split, "category": config.category}

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, Any]]]:
        return [captions[int(index)] for index in draw(rng, len(captions), n)], [dict(metadata) for _ in range(n)]

    return source
