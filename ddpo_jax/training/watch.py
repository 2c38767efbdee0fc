"""Looks at a run from beside it: a trace of some epochs, where the time goes, and a line when nothing moves."""

from __future__ import annotations

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from ml_collections import ConfigDict

TRACES = "profile"  # folder of the traces, in that of the run

# What an epoch does, and what it then waits for if it is not the reward.
STAGES = {
    "starting": "the devices, which draw the fixed prompts or compile, or for another process",
    "sampling": "the devices, which draw images or compile",
    "updating": "the devices, which update or compile, or for another process",
    "writing": "the disk, which takes the metrics and pictures",
    "saving": "the disk, which takes the checkpoint before this one",
}


class Watch:
    """Tells what an epoch costs and what it waits for.

    Args:
      workdir: folder of the run.
      options: the ``log`` section: ``profile`` and ``stall_s``.
      waits_for: says what the reward computes; empty if nothing.
    """

    def __init__(self, workdir: pathlib.Path, options: ConfigDict, waits_for: Callable[[], str]):
        self._folder, self._waits_for = workdir / TRACES, waits_for
        self._traced, self._tracing = traced_epochs(options.profile), False
        self._stall_s = options.stall_s
        self._now = 0, "starting", time.monotonic()  # epoch, stage and since when
        self._seconds: dict[str, float] = {}  # of each stage, when it was last left
        self._start = time.monotonic()  # of the epoch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._trace(False)

    @contextlib.contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """Around the rollout and the updates of an epoch, which traces then name."""
        self.stage("starting")
        self._start = self._now[-1]
        self._now = number, "starting", self._start
        self._trace(number in self._traced)
        with jax.profiler.StepTraceAnnotation("epoch", step_num=number):
            yield

    def _trace(self, wanted: bool) -> None:
        """Starts the xprof trace, or stops and writes it, if that is not how it is already."""
        if wanted and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
        elif self._tracing and not wanted:
            jax.profiler.stop_trace()
        self._tracing = wanted

    def stage(self, name: str) -> None:
        """The epoch is at ``name`` now, one of ``STAGES``; each is progress."""
        epoch, before, since = self._now
        now = time.monotonic()
        self._seconds[before] = now - since
        self._now = epoch, name, now

    def row(self, images: int) -> dict[str, float]:
        """What the metrics say of the epoch when its updates are done.

        Args:
          images: drawn in the epoch, by all processes.
        """
        seconds = time.monotonic() - self._start
        row = {
            "time/epoch_s": seconds,
            "time/save_s": self._seconds.get("saving", 0.0),  # which held up this epoch: that of the one before
            "time/images_per_s_host": images / jax.process_count() / seconds,
        }
        peak = device_peak_bytes()
        return row if peak is None else row | {"time/device_peak_gib": peak / 2**30}

    def _look(self) -> None:
        said: tuple[int, str, float] | None = None
        while not self._stop.wait(min(self._stall_s / 4, 5.0)):
            epoch, stage, since = now = self._now
            idle = time.monotonic() - since
            if idle >= self._stall_s and now != said:
                said = now
                waits = (self._waits_for() if stage == "sampling" else "") or STAGES[stage]
                who = f"process {jax.process_index()}, " if jax.process_count() > 1 else ""
                logging.warning("%sepoch %d: %s since %.0f s; it waits for %s", who, epoch, stage, idle, waits)


def traced_epochs(text: str) -> range:
    """The epochs that ``log.profile`` names: ``2:4`` is 2 and 3; none if it is empty."""
    if not text:
        return range(0)
    first, _, end = text.partition(":")
    return range(int(first), int(end))


def device_peak_bytes() -> int | None:
    """The most that any device of this process has held; None where its allocator does not tell (a CPU)."""
    found = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
