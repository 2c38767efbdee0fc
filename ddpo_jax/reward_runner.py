"""Runs the reward on host threads while the device samples, and refuses to hand on a reward that is not usable.

``make_reward`` turns ``config.reward`` into a function; ``RewardRunner`` calls it in the background. Whatever goes wrong
with a batch (the reward raises, returns NaN or the wrong number of scores, ...) becomes one ``RewardError`` with one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8
from ml_collections import ConfigDict

from ddpo_jax.find import find

Parts = dict[str, Float32[np.ndarray, " N"]]
RewardFn = Callable[[np.ndarray, list[str], list[dict[str, Any]]], Any]


class RewardError(RuntimeError):
    """A reward could not be computed or is not usable; the message is one line."""


def make_reward(config: ConfigDict) -> RewardFn:
    """The reward that ``config`` (the ``reward`` section: ``name`` and the options of that reward) describes.

    ``package.module:function`` is the user's own function, called as ``function(images, prompts, metadata)``. It returns N
    numbers, or (N numbers, {name: N numbers}). ``package.module`` is a module with ``make``, as in ``ddpo_jax/rewards``.

    Raises:
      ValueError: there is no such reward, an option is wrong, or weights are missing.
    """
    found = find("rewards", config.name)
    if ":" in config.name:
        return found
    if not callable(getattr(found, "make", None)):
        raise ValueError(
            f"reward.name={config.name!r}: the module has no function make(config); "
            f"add one, or name a function of it as {config.name}:function"
        )
    return found.make(config)


class PendingReward:
    """The reward of one submitted batch."""

    def __init__(self, future: Future[tuple[np.ndarray, Parts, float]]):
        self._future = future

    def done(self) -> bool:
        """Whether ``result`` returns at once."""
        return self._future.done()

    def result(self) -> tuple[Float32[np.ndarray, " N"], Parts]:
        """Waits for (scores f32[N], parts f32[N] each). Raises ``RewardError`` if they could not be had."""
        scores, parts, _ = self._future.result()
        return scores, parts

    @property
    def seconds(self) -> float:
        """How long the reward itself ran, without time in the queue. Waits as ``result`` does."""
        return self._future.result()[2]


class RewardRunner:
    """Calls one reward function on host threads.

    Args:
      fn: a reward, see ``ddpo_jax.rewards``.
      max_workers: batches computed at the same time; 1 unless the reward mostly waits for something else.
      name: of the reward, for messages.
    """

    def __init__(self, fn: RewardFn, max_workers: int = 1, *, name: str = "reward"):
        if max_workers < 1:
            raise ValueError(f"max_workers={max_workers} must be at least 1")
        self._fn = fn
        self._name = name
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="reward")

    def submit(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> PendingReward:
        """Starts computing the reward of a batch and returns at once. The reward sees read-only images."""
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(f"got {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata; need one of each")
        view = np.asarray(images).view()
        view.flags.writeable = False
        return PendingReward(self._pool.submit(self._run, view, list(prompts), [dict(m) for m in metadata]))

    def close(self) -> None:
        """Drops batches that have not started and waits for the one that runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, Parts, float]:
        start = time.perf_counter()
        try:
            # Copies of the lists: the messages below must show the prompts as they were.
            output = self._fn(images, list(prompts), metadata)
        except Exception as error:  # a reward may raise anything; its traceback is chained
            cause = " ".join(str(error).split())
            raise RewardError(f"reward {self._name!r} raised {type(error).__name__}: {cause}") from error
        scores, parts = check(output, prompts, self._name)
        return scores, parts, time.perf_counter() - start


def check(output: Any, prompts: Sequence[str], name: str) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """What a reward returned as (f32[N], parts).

    Args:
      output: N real numbers, or (N real numbers, {part: N real numbers}); anything numpy can read.
      prompts: the N prompts.
      name: of the reward, for messages.
    Raises:
      RewardError: wrong type, dtype or length; a score that is NaN or infinite (in float32). A part may be NaN.
    """
    parts: Any = {}
    if isinstance(output, tuple):
        if len(output) != 2 or not isinstance(output[1], Mapping):
            received = ", ".join(type(item).__name__ for item in output)
            raise RewardError(
                f"reward {name!r} returned a tuple of ({received}); it must return N scores, or (N scores, dict of parts)"
            )
        output, parts = output
    scores = _numbers(output, len(prompts), f"reward {name!r}")
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(np.argmin(finite))
        raise RewardError(
            f"reward {name!r} returned {scores[first]} for image {first} (prompt {prompts[first]!r}); {np.sum(~finite)} of "
            f"{len(scores)} scores are not finite; every score must be a finite number"
        )
    for part in parts:
        if not isinstance(part, str):
            raise RewardError(f"reward {name!r} returned a part named {part!r}; names of parts must be strings")
    return scores, {key: _numbers(value, len(prompts), f"reward {name!r}, part {key!r},") for key, value in parts.items()}


def _numbers(values: Any, length: int, what: str) -> np.ndarray:
    if values is None:
        raise RewardError(f"{what} returned None; it must return {length} scores, one per image")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:  # ragged lists, tensors of another framework that need a copy first
        cause = " ".join(str(error).split())
        raise RewardError(f"{what} returned a {type(values).__name__} that is not an array of numbers: {cause}") from error
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)  # bfloat16 included
    if not real:
        raise RewardError(f"{what} returned dtype {array.dtype}; it must return real numbers (float32)")
    if array.shape != (length,):
        raise RewardError(f"{what} returned shape {array.shape}; it must return shape ({length},), one score per image")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite by the caller
        return array.astype(np.float32)
