"""Runs the reward on a host thread while the device samples, and refuses to hand on a reward that is not usable.

``make_reward`` turns ``config.reward`` into a function; ``RewardRunner`` calls it in the background. Whatever goes
wrong with a batch (the reward raises, returns NaN or the wrong number of scores, ...) becomes a ``RewardError`` of one
line.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from ml_collections import ConfigDict

from ddpo_jax import errors
from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import batches
from ddpo_jax.rewards._shared.check import Parts, RewardError, RewardFn, call

__all__ = ["PendingReward", "RewardError", "RewardRunner", "make_reward"]

THREAD = "reward"  # name of the thread that calls a reward; ``commands._cli.leave`` looks for it


def make_reward(config: ConfigDict, member: Any, mesh: Mesh | None = None) -> RewardFn:
    """The reward that ``config`` (the ``reward`` section: ``name`` and the options of that reward) describes.

    ``member`` is what ``find`` gives for that name. ``mesh`` is that of the policy, which its networks share; without
    one they are on the first device (``reward.device=mesh``).

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
    with batches.on_mesh(mesh):
        return errors.plug_in(f"reward.name={config.name}: make()", member.make, config)


class PendingReward:
    """The reward of one submitted batch."""

    def __init__(self, runner: RewardRunner, images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]):
        self._runner, self._batch = runner, (images, prompts, metadata)
        self._done = threading.Event()
        self._output: tuple[np.ndarray, Parts] | None = None
        self._error: BaseException | None = None

    def result(self) -> tuple[Float32[np.ndarray, " N"], Parts]:
        """Waits for (scores f32[N], parts f32[N] each).

        Raises:
          RewardError: they could not be had, or the reward takes longer for a batch than the runner allows.
        """
        self.ready(math.inf)
        if self._output is None:
            raise self._error or RewardError("the batch was dropped, because the run ends")
        return self._output

    def ready(self, seconds: float) -> bool:
        """Waits for it, so long at most: whether ``result`` returns or raises at once.

        Raises:
          RewardError: the reward takes longer for a batch than the runner allows.
        """
        end = time.monotonic() + seconds
        while not self._done.wait(min(self._runner.time_left(), max(end - time.monotonic(), 0.0))):
            self._runner.check()
            if time.monotonic() >= end:
                return False
        return True

    def drop(self) -> None:
        """Ends the wait for it, without a result."""
        self._done.set()

    def compute(self, fn: RewardFn, name: str, started: Callable[[str], None]) -> None:
        """Calls the reward; ``started`` is told of the batch when it is on the host."""
        try:
            images, prompts, metadata = self._batch
            view = np.asarray(images).view()  # waits for the device, if that is where they are
            view.flags.writeable = False
            started(f"{len(prompts)} images, the first of {prompts[:1]!r:.60}")
            self._output = call(fn, view, prompts, metadata, name)
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        finally:
            del self._batch
            self._done.set()


class RewardRunner:
    """Calls one reward function on a host thread, batch after batch.

    Args:
      fn: a reward, see ``ddpo_jax.rewards``. If it has a method ``close``, that ends a call which waits for others.
      name: of the reward, for messages.
      wait_s: seconds that it may take for one batch (``reward.wait_s``); a reward whose ``waits_for_others`` is true
        bounds its wait itself.
    """

    def __init__(self, fn: RewardFn, *, name: str = "reward", wait_s: float = math.inf):
        self._fn, self._name = fn, name
        self.waits_for_others = getattr(fn, "waits_for_others", False)
        self._wait_s = math.inf if self.waits_for_others else wait_s
        self._queue: queue.SimpleQueue[PendingReward | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._calls = 0
        self._now: tuple[float, str] | None = None  # since when, and what, the reward computes

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
        if self._closed:
            raise RuntimeError(f"reward {self._name!r} was closed")
        pending = PendingReward(self, images, list(prompts), [dict(m) for m in metadata])
        self._queue.put(pending)
        if self._thread is None:
            # Not of a pool, which would wait for it at the end of the process: a reward may hang.
            self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
            self._thread.start()
        return pending

    @property
    def decoupled(self) -> Mapping[str, float]:
        """Weights of the parts that are standardised one by one (``reward.normalise``); empty where none is."""
        return getattr(self._fn, "decoupled", {})

    def waits_for(self) -> str:
        """What the reward is computing, in words; empty if nothing."""
        if self._now is None:
            return ""
        start, batch = self._now
        return f"reward {self._name!r}, call {self._calls} ({batch}), for {time.monotonic() - start:.0f} s"

    def time_left(self) -> float:
        """Seconds after which ``check`` should be called again."""
        return 1.0 if self._now is None else min(max(self._now[0] + self._wait_s - time.monotonic(), 0.0), 1.0)

    def check(self) -> None:
        """Raises RewardError if the reward has been at one batch for longer than it may."""
        if (now := self._now) is not None and time.monotonic() - now[0] >= self._wait_s:
            raise RewardError(
                f"reward {self._name!r} has not returned from call {self._calls} ({now[1]}) after "
                f"{self._wait_s:g} s, which is reward.wait_s; allow it more, or mend what it waits for"
            )

    def finish(self) -> None:
        """Takes no more batches and drops those that have not started; the reward itself stays open."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while (pending := self._queue.get_nowait()) is not None:
                pending.drop()
        self._queue.put(None)

    def close(self) -> None:
        """``finish``, and closes the reward; does not wait for a batch that runs, which may hang."""
        self.finish()
        if callable(close := getattr(self._fn, "close", None)):
            close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (pending := self._queue.get()) is not None:
            pending.compute(self._fn, self._name, self._started)
            self._now = None

    def _started(self, batch: str) -> None:
        self._calls += 1
        self._now = time.monotonic(), batch
