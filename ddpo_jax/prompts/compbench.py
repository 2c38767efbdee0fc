"""T2I-CompBench (Huang et al. 2023, arXiv:2307.06350): 700 training and 300 validation prompts of each ability.

The sentences are not part of this project; ``prompts.path`` is the folder ``examples/dataset`` of a copy of the
benchmark, with files such as ``spatial_train.txt`` and ``spatial_val.txt``. Some have Windows line endings and some
name a prompt twice: each prompt counts once, in the order of the file.
"""

from __future__ import annotations

import pathlib

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.prompts import PromptFn, _text, draw

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
SPLITS = {"training": "train", "novel": "val"}  # ours -> that of the files


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "path": "",  # folder with color_train.txt, color_val.txt, ...: examples/dataset of a copy of T2I-CompBench
            "category": "color",  # color, shape, texture, spatial, 3d_spatial, numeracy, non_spatial, complex
            "split": "training",  # training: the 700 of _train.txt; novel: the 300 of _val.txt
        }
    )


def prompts(path: str, category: str, split: str) -> list[str]:
    """The distinct prompts of a category in the order of its file.

    Raises:
      InputError: one line for each option that names no file, or the fault of the file.
    """
    faults = []
    if category not in CATEGORIES:
        faults.append(
            f"prompts.category: received {category!r}; it must be one of {', '.join(CATEGORIES)}; use {CATEGORIES[0]}"
        )
    if split not in SPLITS:
        faults.append(f"prompts.split: received {split!r}; it must be one of {', '.join(SPLITS)}; use training")
    folder = pathlib.Path(path).expanduser()
    if not path or not folder.is_dir():
        faults.append(f"{_text.refusal(path)}there is no such folder; give examples/dataset of a copy of T2I-CompBench")
    if faults:
        raise InputError("\n".join(faults))
    file = str(folder / f"{category}_{SPLITS[split]}.txt")
    return list(dict.fromkeys(_text.checked(file, number, line) for number, line in _text.lines(file)))


def make(config: ConfigDict) -> PromptFn:
    """Draws prompts of one category; metadata ``{"split": ..., "category": ...}``."""
    found = prompts(config.path, config.category, config.split)
    metadata = {"split": config.split, "category": config.category}

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, str]]]:
        return [found[index] for index in draw(rng, len(found), n)], [dict(metadata) for _ in range(n)]

    return source
