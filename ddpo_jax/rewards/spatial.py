"""Whether two things stand as the prompt says, in [0, 1]: the 2D spatial rule of T2I-CompBench.

Huang et al. 2023, arXiv:2307.06350. The two things are the first and the last noun of the prompt (girl, boy, man and
woman are "person"); of each, the first detection counts, so one noun twice is one and the same detection. With the
detector's scores s1, s2::

    score = 0.25 s1 + 0.25 s2 + 0.5 position      where both are detected
    score = 0.25 s                                where one is
    score = 0                                     where that is below 0.5

``position`` judges the centers, with dx and dy from the first to the second in pixels of the image at 479 px on its
shorter side::

    near, next to, on side of    1 if |dx| < 150 or |dy| < 150, else 150 / max(|dx|, |dy|)
    left (dx > 0), right (< 0)   1 if |dx| > |dy|, else 0
    top (dy > 0), bottom (< 0)   1 if |dy| > |dx|, else 0

and for the last two lines 0.1 / IoU in place of 1 where the boxes overlap by IoU >= 0.1. With the benchmark's own
detector (UniDet) Stable Diffusion 1.4 reaches 0.1246. Metadata ``objects`` (two names) and ``relation`` go before what
is read from the prompt.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import detect as _detect
from ddpo_jax.rewards._shared import plug as _plug

AUTO = {"detector": _detect.AUTO}
SHORTER_SIDE, NEAR, MAX_IOU, LOWEST = 479, 150, 0.1, 0.5
RELATIONS = ("near", "left", "right", "top", "bottom")
_OTHER_NAMES = {"side": "near", "next to": "near", "beside": "near", "above": "top", "below": "bottom"}
_RELATION = re.compile(
    r"(?<![\w-])(?:(left|right|top|bottom)(?: side)? of|(side) of|(next to|near|beside|above|below))(?![\w-])"
)


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.detector = "auto"  # mini (of the miniature), package.module:function or http://...; auto = by the model
    config.timeout_s = 60.0  # seconds that one answer of a remote detector may take
    config.patience_s = 600.0  # seconds during which a failed request to it is repeated before the run gives up
    return config


def relation_of(text: str) -> str | None:
    """One of ``RELATIONS``: what a prompt or a name of a relation says first, or None."""
    text = " ".join(text.lower().split())
    if text in RELATIONS:
        return text
    found = _RELATION.search(text)
    word = found[found.lastindex or 0] if found else None
    return _OTHER_NAMES[word] if word in _OTHER_NAMES else word


def position(relation: str, first: _detect.Box, second: _detect.Box) -> float:
    """How well two boxes stand in a relation, in [0, 1]; see the module docstring.

    Args:
      relation: one of ``RELATIONS``: where the first stands, seen from the second.
      first, second: boxes in pixels of the image at 479 px on its shorter side.
    """
    dx, dy = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in range(2))
    if relation == "near":
        return 1.0 if abs(dx) < NEAR or abs(dy) < NEAR else NEAR / max(abs(dx), abs(dy))
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    if relation in ("right", "bottom"):
        along = -along
    if along <= 0 or along <= abs(across):
        return 0.0
    iou, _ = _detect.overlap(first, second)
    return 1.0 if iou < MAX_IOU else MAX_IOU / iou


def judge(
    found: list[_detect.Detection], things: tuple[_detect.Phrase, _detect.Phrase], relation: str, scale: float
) -> tuple[float, float, float]:
    """The score of one image, with its parts.

    Args:
      found: detections.
      things: what the first and the second object are.
      relation: one of ``RELATIONS``.
      scale: what takes a pixel of the boxes to one at 479 px on the shorter side.

    Returns:
      (score, share of the two things that were detected, position; NaN where not both were).
    """
    firsts = [next(iter(_detect.of_thing(found, thing, _detect.PEOPLE)), None) for thing in things]
    seen = [detection for detection in firsts if detection is not None]
    score, placed = sum(0.25 * detection.score for detection in seen), float("nan")
    if len(seen) == 2:
        placed = position(relation, _detect.scaled(seen[0].box, scale), _detect.scaled(seen[1].box, scale))
        score += 0.5 * placed
    return (score if score >= LOWEST else 0.0), len(seen) / 2, placed


def asked(prompt: str, metadata: dict[str, Any]) -> tuple[tuple[_detect.Phrase, _detect.Phrase], str]:
    """The two things and the relation that a prompt, or its metadata, names.

    Raises:
      InputError: one of them is not there.
    """
    relation = relation_of(str(metadata["relation"]) if "relation" in metadata else prompt)
    if relation is None:
        where = f"metadata relation {metadata['relation']!r}" if "relation" in metadata else f"prompt {prompt!r}"
        raise InputError(
            f"spatial: {where} names no relation; it must say near, next to, on side of, left of, right of, top of or "
            "bottom of; use prompts of two things, or give metadata objects and relation"
        )
    if "objects" not in metadata:
        phrases = _detect.phrases(prompt)
        if not phrases:
            raise InputError(f"spatial: prompt {prompt!r} names no thing; use prompts of two things")
        return (phrases[0], phrases[-1]), relation
    objects = metadata["objects"]
    if not isinstance(objects, list | tuple) or len(objects) != 2 or not all(isinstance(name, str) for name in objects):
        raise InputError(
            f"spatial: metadata objects: received {objects!r}; it must be two names; write [first, second]"
        )
    return (_detect.named(objects[0]), _detect.named(objects[1])), relation


def make(config: ConfigDict) -> _plug.Closable:
    """The reward; part ``objects_found`` is the share of the two that were detected, ``position`` the rule's (NaN where
    not both were).

    Raises:
      InputError: there is no such detector. When called: a prompt that names no relation.
    """
    detect = _detect.make_detector(config.detector, config.timeout_s, config.patience_s)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        questions = [asked(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        scale = SHORTER_SIDE / min(images.shape[1:3])
        judged = [judge(found, *question, scale) for found, question in zip(detect(images), questions, strict=True)]
        scores, shares, placed = np.asarray(judged, np.float32).reshape(-1, 3).T.copy()
        return scores, {"objects_found": shares, "position": placed}

    return _plug.Closable(reward, detect.close, detect.waits_for_others)
