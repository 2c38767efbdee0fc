"""A reward on many hosts: each process scores its own images, and all learn all scores.

A reward that waits for others (people, a server: ``waits_for_others``) is in one place: process 0 alone makes it and
asks it for everyone's images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int, UInt8
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.errors import InputError
from ddpo_jax.hosts.exchange import gather, is_first, together
from ddpo_jax.hosts.rows import own
from ddpo_jax.rewards._shared.check import Parts, RewardError, RewardFn
from ddpo_jax.rollout.scoring import PendingReward, RewardRunner, make_reward

MEET_S = 60.0  # seconds after which processes that wait for scores look at each other
Scored = tuple[Any, np.ndarray, Parts]  # rows of a batch, their scores and parts
TOLD = ("waits_for_others", "groupwise", "decoupled")  # what a reward says of itself, see ``ddpo_jax.rewards``


class Elsewhere:
    """What stands for a reward that is in process 0, and says the same of itself; never called."""

    def __init__(self, told: Mapping[str, Any]):
        vars(self).update(told)

    def __call__(self, *_: Any) -> Any:
        """Nothing to call here."""
        raise RewardError("this reward is in process 0")


def make(config: ConfigDict, member: Any, mesh: Mesh | None = None) -> RewardFn:
    """``scoring.make_reward`` in every process that is to have it.

    Raises:
      InputError: as ``make_reward``, in all processes if in one.
    """
    fn: Any = None
    with together(InputError):
        fn = make_reward(config, member, mesh) if is_first() else None
    told = gather({name: getattr(fn, name) for name in TOLD if hasattr(fn, name)})[0]
    if not told.get("waits_for_others", False):
        with together(InputError):
            fn = make_reward(config, member, mesh) if fn is None else fn
    return Elsewhere(told) if fn is None else fn


def asked(runner: RewardRunner, images: jax.Array) -> jax.Array:
    """Of a batch on the devices the images that the reward is asked for in this process, on its devices.

    Of a reward that waits for others these are all, in every process: each takes part in bringing them together.
    """
    return sharding.whole(images) if runner.waits_for_others else sharding.own(images)


def submit(
    runner: RewardRunner, images: np.ndarray | jax.Array, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> PendingReward | None:
    """Starts scoring this process's part of a batch, if it has one, and returns at once.

    Args:
      runner: of the reward.
      images: those of ``asked``.
      prompts, metadata: of the whole batch.
    """
    if not runner.waits_for_others:
        rows = own(len(prompts))
        return runner.submit(images, prompts[rows], metadata[rows])
    return runner.submit(images, prompts, metadata) if is_first() else None


def collected(
    pending: Sequence[PendingReward | None], batches: Sequence[Int[np.ndarray, " B"]]
) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """Waits for what ``submit`` started, everywhere: (scores f32[N], parts f32[N] each).

    Args:
      pending: by batch.
      batches: the numbers of each batch's samples, of 0 to N - 1; N over all of them.

    Raises:
      RewardError: they could not be had, in some process.
    """
    found: list[Scored] = []
    _wait([batch for batch in pending if batch is not None])
    for ids, batch in zip(batches, pending, strict=True):
        if batch is not None:
            scores, parts = batch.result()
            found.append((ids if len(scores) == len(ids) else ids[own(len(ids))], scores, parts))
    return _merged(found, sum(map(len, batches)))


def _wait(pending: Sequence[PendingReward]) -> None:
    """Until all processes have their scores. They meet from time to time: no network waits for hours, as people do.

    Raises:
      RewardError: one process cannot have them.
    """
    ready = False
    while not ready:
        end = math.inf if jax.process_count() == 1 else time.monotonic() + MEET_S
        with together(RewardError):
            ready = all(batch.ready(end - time.monotonic()) and bool(batch.result()) for batch in pending)
        ready = all(gather(ready))


def score(
    fn: RewardFn,
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    name: str,
    group: int = 1,
    wait_s: float = math.inf,
) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """(scores f32[N], parts f32[N] each) of images that every process has; each scores a part of them.

    Args:
      fn: the reward.
      images, prompts, metadata: of N samples.
      name: of the reward, for messages.
      group: so many samples in a row are scored by one process; N is a multiple of it.
      wait_s: seconds that the reward may take.

    Raises:
      RewardError: they could not be had, in some process.
    """
    part = np.array_split(np.arange(len(images) // group), jax.process_count())[jax.process_index()]
    rows = slice(part[0] * group, (part[-1] + 1) * group) if len(part) else slice(0, 0)
    runner = RewardRunner(fn, name=name, wait_s=wait_s)
    if runner.waits_for_others:
        rows = slice(0, len(images) if is_first() else 0)
    try:
        pending = [runner.submit(images[rows], prompts[rows], metadata[rows])] if rows.stop else []
        _wait(pending)
        return _merged([(rows, *batch.result()) for batch in pending], len(images))
    finally:
        runner.finish()


def _merged(found: list[Scored], n: int) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """The scores and parts of all processes, by row; a part is NaN where nothing says it."""
    scores, everything = np.zeros(n, np.float32), Parts()
    for rows, values, parts in (entry for entries in gather(found) for entry in entries):
        scores[rows] = values
        for name, numbers in parts.items():
            everything.setdefault(name, np.full(n, np.nan, np.float32))[rows] = numbers
    return scores, everything
