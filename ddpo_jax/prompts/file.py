"""The prompts of a file, UTF-8, one a line with any line ending: plain text, or JSONL with metadata.

A file whose name ends in ``.jsonl`` has one JSON object a line; ``prompt`` (or ``caption``) is the prompt and every
other key is metadata that travels to the reward, such as ``{"prompt": "two cats", "objects": ["cat"], "count": 2}``.
Any other file is text. Empty lines are skipped. A prompt that stands there twice is drawn twice as often.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.prompts import PromptFn, _text, draw


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "path": "",  # the text file, or one with a name in .jsonl, from the current folder
            "shuffle": True,  # True: lines at random; False: every call begins at the first line and goes in order
        }
    )


def read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The prompts of a file with their metadata: what the line brings, and ``line``, the index among the prompts.

    Raises:
      InputError: in one line, why they cannot be had.
    """
    numbered = _text.lines(path, "prompts.name=file needs a file with one prompt a line, text or .jsonl")
    if path.lower().endswith(".jsonl"):
        found = [_text.row(path, number, line) for number, line in numbered]
    else:
        found = [(_text.checked(path, number, line), {}) for number, line in numbered]
    return [(prompt, {"line": index} | metadata) for index, (prompt, metadata) in enumerate(found)]


def make(config: ConfigDict) -> PromptFn:
    """Reads the file once and draws its prompts; the metadata is that of ``read``."""
    found, shuffle = read(config.path), config.shuffle

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, Any]]]:
        chosen = draw(rng, len(found), n) if shuffle else np.arange(n) % len(found)
        return [found[index][0] for index in chosen], [dict(found[index][1]) for index in chosen]

    return source
