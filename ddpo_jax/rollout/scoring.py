"""Runs the reward on host threads while the device samples, and refuses to hand on a reward that is not usable.

``make_reward`` turns ``config.reward`` into a function; ``RewardRunner`` calls it in the background. Whatever goes
wrong with a batch (the reward raises, returns NaN or the wrong number of scores, ...) becomes a ``RewardError`` of one
line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from ddpo_jax import errors
from ddpo_jax.errors import InputError
from ddpo_jax.rewards._check import Parts, RewardError, RewardFn, call

__all__ = ["PendingReward", "RewardError", "RewardRunner", "make_reward"]


def make_reward(config: ConfigDict, member: Any) -> RewardFn:
    """The reward that ``config`` (the ``reward`` section: ``name`` and the options of that reward) describes.

    ``member`` is what ``find`` gives for that name.

    ``package.module:function`` is the user's own, called as ``function(images, prompts, metadata)``; it returns
    N numbers, or (N numbers, {name: N numbers}). ``package.module`` is a module with ``make``, as those here.

    Raises:
      InputError: there is no such reward, an option is wrong, or weights are missing.
    """
    if ":" in config.name:
        return member
    if not callable(getattr(member, "make", None)):
        raise InputError(
            f"reward.name={config.name!r}: the module has no function make(config); "
            f"add one, or name a function of it as {config.name}:function"
        )
    return errors.plug_in(f"reward.name={config.name}: make()", member.make, config)


class PendingReward:
    """The reward of one submitted batch."""

    def __init__(self, future: Future[tuple[np.ndarray, Parts]]):
        self._future = future

    def result(self) -> tuple[Float32[np.ndarray, " N"], Parts]:
        """Waits for (scores f32[N], parts f32[N] each). Raises ``RewardError`` if they could not be had."""
        return self._future.result()


class RewardRunner:
    """Calls one reward function on a host thread, one batch after the other.

    Args:
      fn: a reward, see ``ddpo_jax.rewards``.
      name: of the reward, for messages.
    """

    def __init__(self, fn: RewardFn, *, name: str = "reward"):
        self._fn = fn
        self._name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward")

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
            raise InputError(
                f"got {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata; need one of each"
            )
        return PendingReward(self._pool.submit(self._run, images, list(prompts), [dict(m) for m in metadata]))

    def close(self) -> None:
        """Drops batches that have not started and waits for the one that runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]
    ) -> tuple[np.ndarray, Parts]:
        view = np.asarray(images).view()  # waits for the device, if that is where they are
        view.flags.writeable = False
        return call(self._fn, view, prompts, metadata, self._name)
