"""Prompts: what the policy is asked to draw. One file per source; a new file is found by its name (``prompts.name``).

A source defines::

    def default_config() -> ConfigDict                    # the options of this source, every key commented
    def make(config) -> fn                                # raises InputError if the prompts cannot be had
    fn(rng: np.random.Generator, n: int) -> (prompts list[str] of length n, metadata list[dict] of length n)

``fn`` keeps no state between calls: what it returns follows from ``rng`` alone, so a run resumes exactly. Each of the n
prompts is then sampled ``prompts.samples_per_prompt`` times. The metadata travels with the images to the reward.

A prompt is text of at most 10 000 characters that is not empty.

``package.module:function`` is a user's own ``fn``; it may return the prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import errors
from ddpo_jax.errors import InputError
from ddpo_jax.prompts import _text

PromptFn = Callable[[np.random.Generator, int], tuple[list[str], list[dict[str, Any]]]]


def make_prompts(config: ConfigDict, member: Any) -> PromptFn:
    """The source that ``config`` (the ``prompts`` section) describes; what it returns is checked on every call.

    ``member`` is what ``find`` gives for ``config.name``.

    Raises:
      InputError: there is no such source, or its prompts cannot be had. The function that is returned raises it as
        well, in one line, when the source fails or returns something else than n prompts.
    """
    name = f"prompts.name: received {config.name!r}"
    if ":" in config.name:
        source = member
    elif callable(getattr(member, "make", None)):
        source = errors.plug_in(f"prompts.name={config.name}: make()", member.make, config)
    else:
        raise InputError(f"{name}; the module has no function make(config); add one, or write {config.name}:function")

    def checked(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, Any]]]:
        drawn = errors.plug_in(f"prompts.name={config.name}:", source, rng, n)
        prompts, metadata = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, None)
        prompts = _strings(name, prompts, n)
        if metadata is None:
            return prompts, [{} for _ in prompts]
        return prompts, _dictionaries(name, metadata, n)

    return checked


def draw(rng: np.random.Generator, size: int, n: int) -> np.ndarray:
    """Indices i64[n] below ``size``, each equally likely; none twice before all were drawn, so groups stay apart."""
    rounds = [rng.permutation(size) for _ in range(n // size)]
    return np.concatenate([*rounds, rng.choice(size, n % size, replace=False)]).astype(np.int64)


def _strings(name: str, prompts: Any, n: int) -> list[str]:
    rule = f"called with (rng, {n}) it must return {n} strings, or ({n} strings, {n} dictionaries)"
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        raise InputError(f"{name}; it returned a {type(prompts).__name__}; {rule}")
    if len(prompts) != n:
        raise InputError(f"{name}; it returned {len(prompts)} prompts; {rule}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"{name}; prompt {index} is {prompt!r} ({type(prompt).__name__}); {rule}")
        if (wrong := _text.fault(prompt)) is not None:
            raise InputError(f"{name}; prompt {index} {wrong}")
    return [str(prompt) for prompt in prompts]


def _dictionaries(name: str, metadata: Any, n: int) -> list[dict[str, Any]]:
    right = isinstance(metadata, Sequence) and len(metadata) == n and all(isinstance(item, dict) for item in metadata)
    if not right:
        what = f"{len(metadata)} items" if isinstance(metadata, Sequence) else f"a {type(metadata).__name__}"
        raise InputError(f"{name}; its metadata is {what}; it must be {n} dictionaries, one for each prompt")
    return list(metadata)
