"""Sum of other rewards, each times its weight: ``reward.rewards="aesthetic=0.05,clip_score=10"``.

Every member's score is logged under its name before the weight, and its parts as ``<member>/<part>``. With
``normalise`` "advantages" training adds up what is left of each score after its mean over a prompt's samples, in its
standard deviations over them (Liu et al. 2026, arXiv:2601.05242); what is logged is the plain sum all the same.

If a member compares the images of a prompt with each other, the sum is asked for one prompt at a time; the
``batch_size`` of members with networks is then best ``prompts.samples_per_prompt``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import check as _check
from ddpo_jax.rewards._shared import plug as _plug

AUTO = {"weights": ("mini", "full")}
NORMALISE = ("none", "advantages")


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.rewards = "aesthetic=1,jpeg_compressibility=0.1"  # name=weight, with commas; a weight may be negative
    config.normalise = "none"  # none = the plain sum; advantages = of each reward's, standardised within its prompt
    config.options = ""  # options of the members as member.option=value, with commas: clip_score.scale=100
    config.weights = "auto"  # for members that have both: mini = the embedded miniature, full; auto = by the model
    return config


@dataclasses.dataclass(frozen=True)
class Sum(_plug.Closable):
    """The reward; ``ddpo_jax.rewards`` says what the attributes mean."""

    groupwise: bool = False
    decoupled: Mapping[str, float] = dataclasses.field(default_factory=dict)


def make(config: ConfigDict) -> Sum:
    """The reward; its parts are the scores and the parts of the members.

    Raises:
      InputError: no such member, or its options or weights are wrong.
    """
    if config.weights not in AUTO["weights"]:
        raise InputError(
            f"reward.weights={config.weights!r}: must be {' or '.join(AUTO['weights'])}; auto follows the model"
        )
    if config.normalise not in NORMALISE:
        raise InputError(f"reward.normalise: received {config.normalise!r}; it must be {' or '.join(NORMALISE)}")
    weights = _weights(config.rewards)
    options: dict[str, dict[str, str]] = {name: {} for name in weights}
    for key, value in _pairs(config.options, "reward.options", "clip_score.scale=100"):
        member, dot, option = key.rpartition(".")
        if not dot or member not in options:
            raise InputError(
                f"reward.options: received {key}={value}; "
                f"it must be member.option=value with one of the members {', '.join(options)}"
            )
        options[member][option] = value
    members = {}
    for name in weights:
        try:
            members[name] = _member(name, options[name], AUTO["weights"].index(config.weights))
        except ValueError as error:  # speaks of reward.<option>, which for a member is written in reward.options
            raise InputError(f"reward.rewards: member {name}: {error}") from error

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        total = np.zeros(len(prompts), np.float64)
        parts: dict[str, np.ndarray] = {}
        for name, fn in members.items():
            scores, own = _check.call(fn, images, prompts, metadata, name)
            total += weights[name] * scores.astype(np.float64)
            parts |= {name: scores, **{f"{name}/{key}": part for key, part in own.items()}}
        return total.astype(np.float32), parts

    def close() -> None:
        for fn in members.values():
            if callable(end := getattr(fn, "close", None)):
                end()

    def has(attribute: str) -> bool:
        return any(getattr(fn, attribute, False) for fn in members.values())

    decoupled = weights if config.normalise == "advantages" else {}
    return Sum(reward, close, has("waits_for_others"), has("groupwise"), decoupled)


def _pairs(text: str, key: str, example: str) -> list[tuple[str, str]]:
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise InputError(f"{key}: received {item!r}; it must be name=value, such as {example}")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for name, value in _pairs(text, "reward.rewards", "aesthetic=0.05"):
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"reward.rewards: received {name}={value}; the weight must be a finite number")
        if name in weights or name == "weighted":
            rule = "each reward may be named once" if name in weights else "a weighted sum cannot contain itself"
            raise InputError(f"reward.rewards: received {text!r}; {rule}: {name}")
        weights[name] = weight
    if not weights:
        raise InputError(f"reward.rewards: received {text!r}; it must name a reward, such as aesthetic=0.05")
    return weights


def _member(name: str, options: dict[str, str], column: int) -> Callable[..., Any]:
    """The reward ``name`` with ``options``; what is "auto" there takes the value of ``column`` (miniature, full)."""
    found = find.find("rewards", name)
    if ":" in name:
        if options:
            raise InputError(f"reward.options: a function has no options; received {', '.join(options)}")
        return found
    config = found.default_config() if hasattr(found, "default_config") else ConfigDict()
    for option, text in options.items():
        if option not in config:
            known = ", ".join(config) or "none"
            raise InputError(f"reward.options: it has no option {option!r}; its options are {known}")
        config[option] = _parse(f"reward.options: {name}.{option}", text, type(config[option]))
    for option, values in getattr(found, "AUTO", {}).items():
        if config[option] == "auto":
            config[option] = values[column]
    return found.make(config)


def _parse(key: str, text: str, kind: type) -> Any:
    choices = {"true": True, "false": False}
    if kind is bool and text in choices:
        return choices[text]
    try:
        if kind in (str, int, float):
            return kind(text)
    except ValueError:
        pass
    raise InputError(f"{key}: received {text!r}; it must be {kind.__name__}, as its default is")
