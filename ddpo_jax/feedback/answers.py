"""What people said of images: a file of one JSON object a line, only ever added to, and what it amounts to.

``answers.jsonl`` holds three kinds of lines. All have ``time`` (UTC), ``rater`` (the name the person gave), ``batch``
(names the images that were rated together) and ``prompt``::

    {"kind": "score", "image": NAME, "score": 4, ...}                     1 to 5 stars
    {"kind": "pair", "images": [LEFT, RIGHT], "better": NAME or null, ...}    null: equally good
    {"kind": "undo", "images": [NAME, ...], ...}                          takes the rater's last answer back

An image's NAME is the SHA-256 of its pixels (``image_name``), and ``images/NAME.png`` beside the file is the image. So
an answer belongs to the pixels and the prompt, whatever run they come from. A rater's later answer to the same question
replaces the earlier one; answers of several raters are averaged.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from ddpo_jax.errors import InputError

FILE = "answers.jsonl"
IMAGES = "images"
STARS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Question:
    """What a person is asked: how good is the image, or which of two images is better, for this prompt.

    Attributes:
      prompt: that the images were drawn for.
      images: the name of one image, or those of two in any order.
    """

    prompt: str
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(sorted(self.images)))

    @property
    def id(self) -> str:
        """A name of the question that is the same in every run."""
        text = "\n".join((*self.images, self.prompt))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Pair:
    """What people think of two images of a prompt.

    Attributes:
      prompt: of both.
      images: their names.
      preference: for the first one: 1 = all raters prefer it, 0 = all prefer the second, 0.5 = equally good.
      raters: how many have answered.
    """

    prompt: str
    images: tuple[str, str]
    preference: float
    raters: int


class Answers:
    """All answers that stand, by question and rater."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        self._by_question: dict[Question, dict[str, float]] = {}
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the file. Raises ``ValueError`` in one line if it is none."""
        kind, prompt, rater = _field(record, "kind", str), _field(record, "prompt", str), _field(record, "rater", str)
        if kind == "score":
            score = _field(record, "score", int)
            if score not in STARS:
                raise ValueError(f"'score' is {score}; it must be 1 to 5")
            self._of(prompt, [_field(record, "image", str)])[rater] = float(score)
        elif kind == "pair":
            images = _names(record, 2)
            better = record.get("better", "")
            if better not in (None, *images):
                raise ValueError(f"'better' is {better!r}; it must be one of 'images', or null")
            first = min(images)
            self._of(prompt, images)[rater] = 0.5 if better is None else float(better == first)
        elif kind == "undo":
            self._of(prompt, _names(record, None)).pop(rater, None)
        else:
            raise ValueError(f"'kind' is {kind!r}; it must be score, pair or undo")

    def _of(self, prompt: str, images: Sequence[str]) -> dict[str, float]:
        return self._by_question.setdefault(Question(prompt, tuple(images)), {})

    def value(self, question: Question) -> float | None:
        """The mean answer: stars of an image, or the preference for the pair's first image; None if nobody answered."""
        given = self._by_question.get(question)
        return float(np.mean([*given.values()])) if given else None

    def scores(self) -> dict[tuple[str, str], float]:
        """Mean stars by (image name, prompt)."""
        return {
            (question.images[0], question.prompt): float(np.mean([*given.values()]))
            for question, given in self._by_question.items()
            if given and len(question.images) == 1
        }

    def pairs(self) -> list[Pair]:
        """All compared pairs, in the order in which they were first asked."""
        return [
            Pair(
                question.prompt, (question.images[0], question.images[1]), float(np.mean([*given.values()])), len(given)
            )
            for question, given in self._by_question.items()
            if given and len(question.images) == 2
        ]

    def wins(self) -> dict[tuple[str, str], float]:
        """Share of its comparisons that an image won, by (image name, prompt); a tie is half a win."""
        return win_shares((pair.prompt, *pair.images, pair.preference) for pair in self.pairs())


def win_shares(comparisons: Iterable[tuple[str, str, str, float]]) -> dict[tuple[str, str], float]:
    """Share of its comparisons that each image won, in [0, 1].

    Args:
      comparisons: (prompt, first image, second image, preference for the first in [0, 1]).

    Returns:
      By (image name, prompt): the sum of the preferences for the image, over the number of its comparisons.
    """
    won: dict[tuple[str, str], list[float]] = {}
    for prompt, first, second, preference in comparisons:
        won.setdefault((first, prompt), []).append(preference)
        won.setdefault((second, prompt), []).append(1 - preference)
    return {key: float(np.mean(values)) for key, values in won.items()}


def read(folder: str | os.PathLike[str]) -> Answers:
    """The answers in a folder; none if it has no file yet.

    A last line that was cut off, as by a power failure, is left out: it was never confirmed to the person.

    Raises:
      InputError: the file cannot be read or a line of it is wrong.
    """
    path = pathlib.Path(folder).expanduser() / FILE
    answers = Answers()
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return answers
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give another folder") from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            answers.add(record)
        except (ValueError, RecursionError) as error:
            cause = " ".join(str(error).split())
            raise InputError(f"{path}: line {number}: {cause}; mend the line or remove it") from error
    return answers


def append(folder: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a line, which is on the disk when this returns. Raises ``OSError`` if it cannot be."""
    record = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), **record}
    with open(folder / FILE, "a+b") as file:
        file.seek(0)
        if not (before := file.read()).endswith(b"\n"):
            file.truncate(before.rfind(b"\n") + 1)  # what was cut off never counted
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def image_name(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """SHA-256 of the image's height, width and pixels, as 64 hexadecimal digits; no file format has a part in it."""
    height, width, _ = image.shape
    return hashlib.sha256(f"{height}x{width}:".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def lookup(
    values: dict[tuple[str, str], float], images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
) -> Float32[np.ndarray, " N"]:
    """Scores of images from ``Answers.scores`` or ``Answers.wins``; NaN for what nobody has rated."""
    keys = [(image_name(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
    return np.array([values.get(key, np.nan) for key in keys], np.float32)


def _field(record: dict[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key!r} is {value!r}; it must be {'text' if kind is str else 'a whole number'}")
    return value


def _names(record: dict[str, Any], count: int | None) -> list[str]:
    names = record.get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"'images' is {names!r}; it must be a list of names of images")
    if count and (len(names) != count or len(set(names)) != count):
        raise ValueError(f"'images' is {names!r}; it must name {count} different images")
    return names
