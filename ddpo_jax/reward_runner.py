"""Runs the reward on host threads while the device samples, and refuses to hand on a reward that is not usable.

``make_reward`` turns ``config.reward`` into a function; ``RewardRunner`` calls it in the background. Whatever goes
wrong with a batch (the reward raises, returns NaN or the wrong number of scores, ...) becomes a ``RewardError`` of one
line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from ddpo_jax.find import find
from ddpo_jax.rewards._check import Parts, RewardError, RewardFn, call

__all__ = ["PendingReward", "RewardError", "RewardRunner", "make_reward"]


def make_reward(config: ConfigDict) -> RewardFn:
    """The reward that ``config`` (the ``reward`` section: ``name`` and the options of that reward) describes.

    ``package.module:function`` is the user's own, called as ``function(images, prompts, metadata)``; it returns
    N numbers, or (N numbers, {name: N numbers}). ``package.module`` is a module with ``make``, as those here.

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
        self, images: np.ndarray | jax.Array, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> PendingReward:
        """Starts computing the reward of a batch and returns at once.

        Args:
          images: u8[N,H,W,3], on the host or still being computed on a device. The reward sees them read-only.
          prompts: N.
          metadata: N.
        """
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"got {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata; need one of each"
            )
        return PendingReward(self._pool.submit(self._run, images, list(prompts), [dict(m) for m in metadata]))

    def close(self) -> None:
        """Drops batches that have not started and waits for the one that runs.

        A reward that may wait for long, such as for people, has a method ``close``: then its call ends at once.
        """
        if callable(close := getattr(self._fn, "close", None)):
            close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]
    ) -> tuple[np.ndarray, Parts, float]:
        view = np.asarray(images).view()  # waits for the device, if that is where they are
        view.flags.writeable = False
        start = time.perf_counter()
        scores, parts = call(self._fn, view, prompts, metadata, self._name)
        return scores, parts, time.perf_counter() - start
