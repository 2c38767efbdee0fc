"""What a run writes for people: rows of metrics, pictures, progress, a line when nothing moves.

Process 0 writes it for all; that nothing moves each process says of itself.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.hosts import exchange
from ddpo_jax.training.watch import Watch
from ddpo_jax.workdir import metrics
from ddpo_jax.workdir.lock import Lock
from ddpo_jax.workdir.tracker import Tracker


class Record:
    """The writer of a run's metrics and its progress; in other processes than the first it writes no files.

    All processes call its methods at the same point: what cannot be written ends them all.

    Args:
      workdir: folder of the run.
      lock: of that folder, in process 0.
      start: the first epoch that is written.
      config: of the run.
      waits_for: says what the reward computes; empty if nothing.

    Raises:
      InputError: what earlier epochs wrote cannot be read.
      RunFailure: as everywhere here, something cannot be written.
    """

    def __init__(
        self, workdir: pathlib.Path, lock: Lock | None, start: int, config: ConfigDict, waits_for: Callable[[], str]
    ):
        self._lock, self._writer, self._progress = lock, None, None
        self._watch = Watch(workdir, config.log, waits_for)
        with exchange.together(InputError, RunFailure):
            if exchange.is_first():
                tracker = Tracker(workdir, config.log.wandb, config) if config.log.wandb else None
                self._writer = metrics.Writer(workdir, start, tracker)
                self._progress = metrics.Progress(config.num_epochs, start)

    def epoch(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Around the rollout and the updates of an epoch, see ``Watch.epoch``."""
        return self._watch.epoch(number)

    def stage(self, name: str) -> None:
        """The epoch is at ``name`` now, one of ``watch.STAGES``; a terminal shows it."""
        self._watch.stage(name)
        if self._progress is not None:
            self._progress.phase(name)

    def row(self, row: Mapping[str, Any], images: int) -> None:
        """Appends the metrics of an epoch of so many images, if the folder is still this run's."""
        row = {**row, **self._watch.row(images)}

        def write(writer: metrics.Writer) -> None:
            if self._lock is not None:
                self._lock.check()
            writer.write(row)

        self._write(write)

    def images(self, epoch: int, images: np.ndarray, prompts: Sequence[str], rewards: np.ndarray) -> None:
        """Writes an epoch's grid of images."""
        self._write(lambda writer: writer.images(epoch, images, prompts, rewards))

    def fixed(self, epochs: int, images: np.ndarray, prompts: Sequence[str]) -> None:
        """Writes what the policy after ``epochs`` epochs makes of the run's fixed prompts."""
        self._write(lambda writer: writer.fixed(epochs, images, prompts))

    def done(self, row: Mapping[str, Any]) -> None:
        """One more epoch is done."""
        if self._progress is not None:
            self._progress.update(row)

    def _write(self, write: Callable[[metrics.Writer], Any]) -> None:
        with exchange.together(RunFailure):
            if self._writer is not None:
                write(self._writer)

    def __enter__(self) -> Record:
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watch.__exit__(kind, error, trace)
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None and error is None:
            self._progress.close()
