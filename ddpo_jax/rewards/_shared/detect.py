"""Boxes and nouns, shared by the rewards that judge what a detector found: detectors, labels, and words of prompts.

A detector is ``fn(images u8[N,H,W,3]) -> N lists of (label, score, (x0, y0, x1, y1))``, in pixels with y pointing down;
score is in [0, 1]. Its order is kept: where a rule takes the first detection of a label, that is the detector's first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpo_jax.errors import InputError
from ddpo_jax.mini import world
from ddpo_jax.mini.verifier import Verifier
from ddpo_jax.rewards._shared import clip as _clip
from ddpo_jax.rewards._shared import plug as _plug
from ddpo_jax.rewards._shared.check import RewardError

AUTO = ("mini", "")  # of the option ``detector``: the miniature has one, for any other model it must be named
MINI_BOX = 8.0  # px; the verifier gives centers without sizes, and this is the smallest thing the world draws
MINI_PRESENCE = 0.5  # above it the verifier is believed to see a thing
Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """One thing in an image."""

    label: str
    score: float
    box: Box  # x0, y0, x1, y1 in pixels


def make_detector(source: str, timeout_s: float, patience_s: float) -> _plug.Closable:
    """The detector that ``reward.detector`` names: images u8[N,H,W,3] to N lists of ``Detection``.

    Args:
      source: "mini" (the miniature's verifier), ``package.module:function``, or the URL of a server that answers
        ``{"detections": [[{"label": ..., "score": ..., "box": [x0, y0, x1, y1]}, ...], ...]}``, a list for each image.
      timeout_s: seconds that one answer of a server may take.
      patience_s: seconds during which a request to a server is repeated.

    Raises:
      InputError: there is no such detector. What is returned raises ``RewardError`` where its output is not usable.
    """
    if source == "mini":
        return _plug.Closable(_mini_detector(), lambda: None)
    if source in ("", "auto"):
        raise InputError(
            f"reward.detector: received {source!r}; this reward needs an object detector; write "
            "package.module:function or the URL of a server, or mini for pictures of the miniature"
        )
    ask = _plug.connect(source, "reward.detector", "detections", timeout_s, patience_s)

    def detect(images: np.ndarray) -> list[list[Detection]]:
        return [[_checked(item) for item in _listed(found)] for found in ask(images)]

    return _plug.Closable(detect, ask.close, ask.waits_for_others)


def _listed(found: Any) -> Sequence[Any]:
    if not isinstance(found, list | tuple):
        raise RewardError(f"reward.detector gave a {type(found).__name__} for an image; it must give a list of boxes")
    return found


def _checked(item: Any) -> Detection:
    rule = "it must be (label, score in [0, 1], (x0, y0, x1, y1)) with x0 <= x1 and y0 <= y1"
    try:
        label, score, box = (item[key] for key in ("label", "score", "box")) if isinstance(item, Mapping) else item
        score, (x0, y0, x1, y1) = float(score), (float(edge) for edge in box)
    except (TypeError, ValueError, KeyError) as error:
        raise RewardError(f"reward.detector gave {item!r:.120}; {rule}") from error
    right = isinstance(label, str) and 0 <= score <= 1 and math.inf > x1 >= x0 > -math.inf
    if not (right and math.inf > y1 >= y0 > -math.inf):
        raise RewardError(f"reward.detector gave {item!r:.120}; {rule}")
    return Detection(label, score, (x0, y0, x1, y1))


def _mini_detector() -> Callable[[np.ndarray], list[list[Detection]]]:
    """The miniature's verifier as a detector: labels are the shapes of the world, scores presence times shape."""
    verifier = Verifier.from_folder(_clip.embedded("verifier", "reward.detector", "mini"))
    size = world.IMAGE_SIZE

    def detect(images: np.ndarray) -> list[list[Detection]]:
        if images.shape[1:] != (size, size, 3):
            raise InputError(
                f"reward.detector: received 'mini'; it sees pictures of {size} x {size}, these are "
                f"{images.shape[2]} x {images.shape[1]}; write package.module:function or the URL of a server"
            )
        found = verifier.detections(images)
        shape, likely = found.shape.argmax(-1), found.shape.max(-1)
        return [
            [
                Detection(world.SHAPES[shape[n, k]], float(found.presence[n, k] * likely[n, k]), _around(center))
                for k, center in enumerate(found.center[n])
                if found.presence[n, k] > MINI_PRESENCE
            ]
            for n in range(len(images))
        ]

    return detect


def _around(center: np.ndarray) -> Box:
    x, y, half = float(center[0]), float(center[1]), MINI_BOX / 2
    return x - half, y - half, x + half, y + half


# ----------------------------------------------------------------------------------------------------------------------
# Geometry
# ----------------------------------------------------------------------------------------------------------------------


def scaled(box: Box, factor: float) -> Box:
    """``box`` in an image that is ``factor`` times as large."""
    x0, y0, x1, y1 = box
    return factor * x0, factor * y0, factor * x1, factor * y1


def overlap(first: Box, second: Box) -> tuple[float, float]:
    """(intersection over union, the larger share of a box that the other covers), both in [0, 1].

    A box without area covers nothing and is covered by nothing.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    common = max(width, 0.0) * max(height, 0.0)
    return (common / (sum(areas) - common), common / min(areas)) if common > 0 else (0.0, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------

PEOPLE = {word: "person" for word in ("girl", "boy", "man", "woman")}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
# Words that end a noun phrase or stand before one.
_STOPS = frozenset(
    "the this that these those some many several each every no another both other his her its their my your our "
    "of on in at to by with from for over under into onto near beside behind above below along alongside through "
    "across against around between among inside outside as and or but while next left right top bottom side front back "
    "is are was were be been being am has have had do does there it they he she who which".split()
)
_IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "oxen": "ox",
}  # fmt: skip
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")
# What stands before "a" where it begins another thing of the picture; not so in "three dogs shared a bone".
_BEFORE_A_THING = frozenset("and near beside above below behind under of to with".split())


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A run of words that names a thing: "two red stars" is words ("red", "stars") and number 2."""

    words: tuple[str, ...]
    number: int | None = None  # a, an, one = 1 ... eight = 8; None where the prompt gives none


def phrases(text: str) -> list[Phrase]:
    """The noun phrases of a sentence, found by rule: runs of words between articles, numbers, prepositions, forms of
    be and have, and punctuation.

    "a" and "an" count one only where the phrase is part of the picture's list: at the start, after a comma or "and",
    and after words such as "near", "left of" or "with"; not in "three dogs shared a bone".
    """
    found: list[Phrase] = []
    words: list[str] = []
    number, before = None, ","
    for token in [*_TOKEN.findall(text.lower()), "."]:
        stop = token in _STOPS or token in NUMBERS or not token[0].isalnum()
        if not stop:
            words.append(token)
        else:
            if words:
                found.append(Phrase(tuple(words), number))
                words, number = [], None
            if token in NUMBERS:
                listed = token not in ("a", "an") or before in _BEFORE_A_THING or not before[0].isalnum()
                number = NUMBERS[token] if listed else None
            elif token in _STOPS:
                number = None  # "one of the cats"
        before = token
    return found


def named(text: str) -> Phrase:
    """The thing that a name from metadata means: "a red star" is the phrase ("red", "star").

    Raises:
      InputError: it has no word.
    """
    words = tuple(word for phrase in phrases(text) for word in phrase.words)
    if not words:
        raise InputError(f"metadata objects: received {text!r}; it names nothing; write a noun")
    return Phrase(words)


def of_thing(
    found: Sequence[Detection], thing: Phrase, aliases: Mapping[str, str], within: bool = False
) -> list[Detection]:
    """The detections of a thing, by the first of these names that any label has.

    The word for which the aliases have the thing's; the thing's own; with ``within`` the thing's last word as a part of
    a label ("phones" of "cell phone").

    Args:
      found: of one image.
      thing: of the prompt.
      aliases: words of the prompt that the benchmark's detector calls otherwise, such as ``PEOPLE``.
      within: see above.
    """
    ways: list[Callable[[str], bool]] = [
        lambda label: matches(label, thing, aliases),
        lambda label: matches(label, thing),
    ]
    if within:
        last = Phrase(thing.words[-1:])
        ways.append(lambda label: any(matches(word, last, aliases) for word in _words(label)))
    every = ([detection for detection in found if way(detection.label)] for way in ways)
    return next(filter(None, every), [])


def matches(label: str, phrase: Phrase, aliases: Mapping[str, str] | None = None) -> bool:
    """Whether a detection's label names the thing of a phrase: its words stand in the phrase, in singular or plural.

    Args:
      label: "star", "traffic light", "Traffic_light".
      phrase: of the prompt.
      aliases: words of the phrase that mean another one, such as ``PEOPLE``.
    """
    wanted = [_forms(word, aliases or {}) for word in phrase.words]
    given = [_forms(word, {}) for word in _words(label)]
    ends = range(len(wanted) - len(given) + 1) if given else ()
    return any(all(a & b for a, b in zip(given, wanted[start:], strict=False)) for start in ends)


def _words(label: str) -> list[str]:
    return [word for word in _TOKEN.findall(label.lower().replace("_", " ")) if word[0].isalnum()]


def _forms(word: str, aliases: Mapping[str, str]) -> set[str]:
    """A word and what it may be the plural of, with aliases in place of the words they stand for."""
    forms = {word, _IRREGULAR[word]} if word in _IRREGULAR else {word}
    if word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
        for ending, singular in (("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
            if word.endswith(ending):
                forms.add(word.removesuffix(ending) + singular)
    return {aliases[form] if form in aliases else form for form in forms}


def whole(value: Any) -> bool:
    """Whether a value of metadata is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
