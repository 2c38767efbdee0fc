"""What a run tells about itself: ``metrics.jsonl``, TensorBoard events, image grids, curves, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from ddpo_jax.errors import InputError, one_line
from ddpo_jax.workdir import files, grid, show
from ddpo_jax.workdir.events import Events
from ddpo_jax.workdir.tracker import Tracker

FILE = "metrics.jsonl"


class Writer:
    """Writes ``metrics.jsonl``, TensorBoard events and the pictures in ``samples/`` into the folder of a run.

    Whatever cannot be written (a full disk, a folder that was taken away) is a ``RunFailure``.

    Args:
      workdir: the folder; made if it does not exist.
      start_epoch: first epoch this process will write. Rows of it and later ones, which a killed process left behind,
        are dropped (and hidden in TensorBoard), so that every epoch appears once.
      tracker: gets the same rows and pictures as TensorBoard, and is closed with the writer.
    """

    def __init__(self, workdir: str | os.PathLike[str], start_epoch: int = 0, tracker: Tracker | None = None):
        self._workdir = pathlib.Path(workdir)
        self._path = self._workdir / FILE
        rows = [row for row in read_metrics(self._workdir) if row["epoch"] < start_epoch]
        if absent := sorted(set(range(start_epoch)) - {row["epoch"] for row in rows}):
            logging.warning(
                "%s lacks %d of the %d epochs that are trained, from epoch %d on: they are not written again",
                *(self._path, len(absent), start_epoch, absent[0]),
            )
        self._lines = [json.dumps(row) + "\n" for row in rows]
        with files.writing(self._workdir):
            (self._workdir / "samples").mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        events = Events(self._workdir, start_epoch)
        self._sinks: list[Events | Tracker] = [events, tracker] if tracker else [events]

    def _open(self) -> int:
        """Writes all lines there are into a new file and opens it to append more."""
        files.write_text(self._path, "".join(self._lines))
        with files.writing(self._path):
            return os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one epoch, on disk when this returns. A file that was removed meanwhile is written again, whole.

        Args:
          row: ``epoch`` and scalars (Python, numpy or jax). A number that is not finite is written as null, because
            JSON has no word for it.
        """
        plain = {key: _plain(key, value) for key, value in row.items()}
        self._lines.append(json.dumps(plain, allow_nan=False) + "\n")
        if files.is_at(self._file, self._path):
            with files.writing(self._path):
                files.append(self._file, self._lines[-1].encode())
                os.fsync(self._file)
        else:
            logging.warning("%s was removed while the run went on: it is written again", self._path)
            os.close(self._file)
            self._file = self._open()
        shown = {key: value for key, value in plain.items() if key != "epoch" and isinstance(value, int | float)}
        for sink in self._sinks:
            sink.scalars(row["epoch"], shown)

    def images(
        self, epoch: int, images: np.ndarray, prompts: Sequence[str], rewards: Sequence[float] | np.ndarray
    ) -> pathlib.Path:
        """Writes ``samples/epoch_NNNN.png`` and the same picture to TensorBoard.

        Args:
          epoch: number of the epoch.
          images: u8[N,H,W,3].
          prompts: N captions.
          rewards: N numbers, written under the images.

        Returns:
          The path of the picture.
        """
        title = f"epoch {epoch}   mean reward of these {len(images)}: {np.mean(rewards):.4g}"
        captions = [f"{prompt}\nreward {reward:.4g}" for prompt, reward in zip(prompts, rewards, strict=True)]
        picture = grid.captioned(images, captions, title)
        self._show(epoch, "samples", picture)
        return self._save(f"epoch_{epoch:04d}", picture)

    def fixed(self, epochs: int, images: np.ndarray, prompts: Sequence[str]) -> None:
        """Writes what the policy after ``epochs`` epochs makes of prompts and noise that stay the same.

        ``samples/before.png`` if that is none, else ``samples/after.png`` and, next to each other,
        ``samples/before_after.png``.

        Args:
          epochs: finished ones.
          images: u8[N,H,W,3].
          prompts: N captions.
        """
        title = f"after {epochs} epoch{'s' * (epochs > 1)}" if epochs else "before training"
        picture = grid.captioned(images, prompts, title)
        self._show(epochs, "fixed_prompts", picture)
        path, before = self._save("after" if epochs else "before", picture), self._workdir / "samples" / "before.png"
        if path != before and before.exists():
            try:
                with Image.open(before) as earlier:
                    earlier.load()
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises these for what is no picture
                logging.warning("%s cannot be read: %s; before_after.png is left out", before, one_line(error))
            else:
                self._save("before_after", grid.side_by_side([earlier, picture]))

    def _show(self, epoch: int, name: str, picture: Image.Image) -> None:
        for sink in self._sinks:
            sink.image(epoch, name, np.asarray(picture))

    def _save(self, name: str, picture: Image.Image) -> pathlib.Path:
        path = self._workdir / "samples" / f"{name}.png"
        with files.replacing(path) as temporary:
            picture.save(temporary, format="PNG")
        return path

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of ``workdir/metrics.jsonl`` in order; none if there is no file.

    Every row has a whole number ``epoch`` and a number ``reward_queries``, both larger than those of the row before,
    and ``reward/mean``; whatever has a slash in its name is a finite number or None. A last line without its end (a
    machine that lost power) is left out.

    Raises:
      InputError: the file cannot be read, or one of its other lines is not such a row.
    """
    path = pathlib.Path(workdir) / FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # a folder in its place, no permission
        raise InputError(
            f"{path}: it cannot be read: {one_line(error)}; put the file back or use another folder"
        ) from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or half a line
        row = _row(line)
        if row is None or rows and not all(row[key] > rows[-1][key] for key in ("epoch", "reward_queries")):
            raise InputError(
                f"{path}, line {number}: expected a JSON object with ascending epoch and reward_queries, a reward/mean "
                f"and else numbers or null; received {line[:80].decode(errors='replace')!r}; remove that line or use "
                "another folder"
            )
        rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    right = (
        isinstance(row, dict)
        and {"epoch", "reward_queries", "reward/mean"} <= row.keys()
        and isinstance(row["epoch"], int)
        and all(_number(row[key]) >= 0 for key in ("epoch", "reward_queries"))
        and all(value is None or not math.isnan(_number(value)) for key, value in row.items() if "/" in key)
    )
    return row if right else None


def _number(value: Any) -> float:
    """``value`` if it is a finite number, else NaN, which compares false with everything."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def _plain(key: str, value: Any) -> int | float | str | None:
    if isinstance(value, str | bool | int) or value is None:
        return value
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "fiub":
        raise InputError(f"metric {key}: expected a scalar; received {array.dtype}{list(array.shape)}")
    number = array.item()
    return number if math.isfinite(number) else None


def plot_curve(
    path: str | os.PathLike[str],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    y: str = "reward/mean",
    x: str = "reward_queries",
) -> None:
    """Draws one line per run to a PNG, by default mean reward against reward queries.

    Args:
      path: of the PNG.
      runs: rows of ``read_metrics`` by label; rows without a value are left out.
      y: metric of the vertical axis.
      x: metric of the horizontal axis.
    """
    with show.plot(path) as (axes,):
        for label, rows in runs.items():
            points = [(row[x], row[y]) for row in rows if row[x] is not None and row[y] is not None]
            columns = zip(*points, strict=True) if points else ([], [])
            axes.plot(*columns, label=label, linewidth=1.6, marker="o" if len(points) == 1 else None)
        axes.set_xlabel(x.replace("_", " "))
        axes.set_ylabel(y.replace("/", " "))


class Progress:
    """Progress of a run: a bar on a terminal, one line per epoch elsewhere (a CI log, a file).

    Args:
      total_epochs: of the whole run.
      start: epochs already done (a resumed run).
      stream: where to; standard error by default.
    """

    def __init__(self, total_epochs: int, start: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._total = total_epochs
        self._done = start
        self._ends = [time.monotonic()]
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_epochs,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}",
            )

    def phase(self, name: str) -> None:
        """Says what the epoch is at ("sampling"); shown on a terminal only."""
        with _if_someone_reads():
            if self._bar is not None:
                self._bar.set_description_str(f"{name:<10}")

    def update(self, row: Mapping[str, Any]) -> None:
        """One more epoch is done; ``row`` is what went to ``Writer.write``."""
        self._done += 1
        self._ends.append(time.monotonic())
        figures = f"reward {row['reward/mean']:.4g}  queries {row['reward_queries']}  {self._pace()}"
        with _if_someone_reads():
            if self._bar is None:
                print(f"epoch {self._done}/{self._total}  {figures}", file=self._stream, flush=True)
            else:
                self._bar.set_postfix_str(figures, refresh=False)
                self._bar.update(1)

    def _pace(self) -> str:
        """Mean of the last ten epochs; the first of the process compiles, so it says nothing of those to come."""
        if len(self._ends) == 2:
            return f"{self._ends[1] - self._ends[0]:.3g} s with compilation"
        ends = self._ends[1:][-11:]
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
        return f"{seconds:.3g} s/epoch  ETA {duration(seconds * (self._total - self._done))}"

    def close(self) -> None:
        """Ends the bar."""
        with _if_someone_reads():
            if self._bar is not None:
                self._bar.close()


def _if_someone_reads() -> contextlib.AbstractContextManager[None]:
    """The terminal that a run was started from may be closed, and a pipe's reader may end: the run goes on."""
    return contextlib.suppress(OSError)


def duration(seconds: float) -> str:
    """``3725`` as ``1:02:05``, ``65`` as ``1:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
