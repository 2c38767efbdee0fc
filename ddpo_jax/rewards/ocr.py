"""How well an image shows the text that its prompt asks for: one minus the normalised edit distance, in [0, 1].

The text is what stands in quotes in the prompt (several quotations are joined by a blank), or metadata ``text``. With
``d`` the smallest number of characters to insert, delete or replace (Levenshtein) between it and what the recogniser
reads in the image::

    score = 1 - d / max(length of the one, length of the other)

Upper and lower case are the same, and so are all kinds and amounts of white space.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import plug as _plug

_DOUBLE = re.compile(r'"([^"]*)"|“([^”]*)”|«([^»]*)»')
# A straight single quote opens at the beginning of a word and closes at the end of one; within it is an apostrophe.
_SINGLE = re.compile(r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)|‘((?:[^’]|(?<=\w)’(?=\w))*)’")


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.recogniser = ""  # package.module:function (images -> strings), or the URL of a server
    config.timeout_s = 60.0  # seconds that one answer of a remote recogniser may take
    config.patience_s = 600.0  # seconds during which a failed request to it is repeated before the run gives up
    return config


def quoted(prompt: str) -> str:
    """The text in quotes in a prompt; "" where there is none. Single quotes count where there are no double ones."""
    for pattern in (_DOUBLE, _SINGLE):
        found = [_plain("".join(groups)) for groups in pattern.findall(prompt)]
        if any(found):
            return " ".join(filter(None, found))
    return ""


def similarity(first: str, second: str) -> float:
    """One minus the edit distance over the longer length, in [0, 1], of case-folded texts with single blanks."""
    first, second = _plain(first).casefold(), _plain(second).casefold()
    longest = max(len(first), len(second))
    return 1 - _distance(first, second) / longest if longest else 1.0


def _plain(text: str) -> str:
    return " ".join(text.split())


def _distance(first: str, second: str) -> int:
    """Levenshtein's distance, a row of his table after the other."""
    letters = np.array([ord(letter) for letter in second], np.int64)
    steps = np.arange(len(second) + 1)
    row = steps
    for i, letter in enumerate(first, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        # Insertions run along the row: the best of all that lie to the left, each as far away as it is.
        row = steps + np.minimum.accumulate(np.concatenate([[i], changed]) - steps)
    return int(row[-1])


def wanted(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that an image should show: metadata ``text``, or what the prompt quotes.

    Raises:
      InputError: there is none.
    """
    if "text" in metadata:
        text = metadata["text"]
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"ocr: metadata text: received {text!r:.80}; it must be the text that the image should show"
            )
        return text
    text = quoted(prompt)
    if not text:
        raise InputError(
            f"ocr: prompt {prompt!r} quotes no text; the text to draw must stand in quotes, as in "
            'a sign that says "OPEN"; use such prompts, or give metadata text'
        )
    return text


def make(config: ConfigDict) -> _plug.Closable:
    """The reward; part ``exact`` is 1 where the text was read exactly, else 0.

    Raises:
      InputError: there is no such recogniser. When called: a prompt that asks for no text.
    """
    read = _plug.connect(config.recogniser, "reward.recogniser", "texts", config.timeout_s, config.patience_s)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        targets = [wanted(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        seen = _plug.texts(read(images), "reward.recogniser")
        scores = np.array([similarity(target, text) for target, text in zip(targets, seen, strict=True)], np.float32)
        return scores, {"exact": (scores == 1).astype(np.float32)}

    return _plug.Closable(reward, read.close, read.waits_for_others)
