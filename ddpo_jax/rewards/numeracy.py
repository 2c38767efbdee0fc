"""Whether as many things are there as the prompt says, in [0, 1]: the numeracy rule of T2I-CompBench.

Huang et al. 2023, arXiv:2307.06350. The prompt's n things are the nouns after a, an, one, two ... eight. Each adds 1/n
times (a half for being detected at all, a half for being detected exactly as often as asked). Detections of one label
are the same thing where their boxes overlap by IoU > 0.9 or one is covered by more than 90 %; of such, the first stays.

A thing that no label names is looked for as a part of labels: "three phones" are three of "cell phone". A thing that is
named twice is looked for twice. With the benchmark's own detector (UniDet) Stable Diffusion 1.4
reaches 0.4461. Metadata ``objects`` (names) with ``count`` (a number, or one for each) goes before what is read from
the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import detect as _detect
from ddpo_jax.rewards._shared import plug as _plug

AUTO = {"detector": _detect.AUTO}
SAME_IOU = SAME_COVERED = 0.9
# Words of the benchmark's prompts that its detector calls otherwise.
ALIASES = _detect.PEOPLE | {"ship": "boat", "television": "tv", "goldfish": "fish", "painting": "picture"}


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.detector = "auto"  # mini (of the miniature), package.module:function or http://...; auto = by the model
    config.timeout_s = 60.0  # seconds that one answer of a remote detector may take
    config.patience_s = 600.0  # seconds during which a failed request to it is repeated before the run gives up
    return config


def merge(found: list[_detect.Detection]) -> list[_detect.Detection]:
    """The detections without repetitions of an earlier one of the same label; see the module docstring."""
    kept: list[_detect.Detection] = []
    for detection in found:
        overlaps = [_detect.overlap(detection.box, other.box) for other in kept if other.label == detection.label]
        if not any(iou > SAME_IOU or covered > SAME_COVERED for iou, covered in overlaps):
            kept.append(detection)
    return kept


def judge(found: list[_detect.Detection], things: list[_detect.Phrase]) -> tuple[float, float, float]:
    """(score, share of the things that are detected, share detected exactly as often as asked) of one image.

    Args:
      found: detections.
      things: each with its number.
    """
    merged = merge(found)
    counts = [len(_detect.of_thing(merged, thing, ALIASES, within=True)) for thing in things]
    detected = float(np.mean([count > 0 for count in counts]))
    exact = float(np.mean([count == thing.number for count, thing in zip(counts, things, strict=True)]))
    return 0.5 * detected + 0.5 * exact, detected, exact


def asked(prompt: str, metadata: dict[str, Any]) -> list[_detect.Phrase]:
    """The things that a prompt, or its metadata, counts, each with its number.

    Raises:
      InputError: there is none.
    """
    if "objects" not in metadata:
        counted = [phrase for phrase in _detect.phrases(prompt) if phrase.number is not None]
        if not counted:
            raise InputError(
                f"numeracy: prompt {prompt!r} counts nothing; it must name things after {', '.join(_detect.NUMBERS)}; "
                "use such prompts, or give metadata objects and count"
            )
        return counted
    objects = metadata["objects"]
    counts: Any = metadata["count"] if "count" in metadata else None
    counts = [counts] if _detect.whole(counts) else counts
    listed = isinstance(objects, list | tuple) and isinstance(counts, list | tuple)
    if not (listed and 0 < len(objects) == len(counts) and all(isinstance(name, str) for name in objects)):
        raise InputError(
            f"numeracy: metadata objects: received {objects!r} with count {counts!r}; each object needs its number; "
            'write {"objects": ["cat", "dog"], "count": [2, 1]}'
        )
    if not all(_detect.whole(count) for count in counts):
        raise InputError(
            f"numeracy: metadata count: received {counts!r}; it must be whole numbers from 1; write [2, 1]"
        )
    return [_detect.Phrase(_detect.named(name).words, count) for name, count in zip(objects, counts, strict=True)]


def make(config: ConfigDict) -> _plug.Closable:
    """The reward; parts ``objects_found`` and ``counts_exact`` are the shares of the prompt's things.

    Raises:
      InputError: there is no such detector. When called: a prompt that counts nothing.
    """
    detect = _detect.make_detector(config.detector, config.timeout_s, config.patience_s)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        questions = [asked(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        judged = [judge(found, things) for found, things in zip(detect(images), questions, strict=True)]
        scores, detected, exact = np.asarray(judged, np.float32).reshape(-1, 3).T.copy()
        return scores, {"objects_found": detected, "counts_exact": exact}

    return _plug.Closable(reward, detect.close, detect.waits_for_others)
