"""The folder of a run: its config, its checkpoints, and what stands there at the end."""

from __future__ import annotations

import os
import pathlib
import signal
from types import FrameType, TracebackType

from absl import logging
from ml_collections import ConfigDict

from ddpo_jax.config.keys import flatten, from_json, to_json
from ddpo_jax.errors import InputError, Interrupted
from ddpo_jax.workdir import metrics

# What a resumed run may change, besides log.* and mesh.*.
FREE = ("checkpoint.every", "checkpoint.keep", "train.microbatch_size")


def diff_that_matters(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What forbids to go on with a run: one line for each key whose change would make another run of it.

    ``num_epochs`` may grow; ``log.*``, ``mesh.*`` and ``FREE`` may change: on other devices a run goes on with the same
    numbers up to rounding.

    Args:
      old: the config the run was started with.
      new: the config of this command, resolved in the same way.
    """
    before, after = (flatten(from_json(to_json(config))) for config in (old, new))  # tuples in both
    lines = []
    for key in before | after:
        if key.startswith(("log.", "mesh.")) or key in FREE:
            continue
        was, now = before.get(key, "absent"), after.get(key, "absent")
        if was == now or (key == "num_epochs" and now > was):
            continue
        rule = "it may only grow" if key == "num_epochs" else "a run keeps it"
        lines.append(f"{key}: received {now!r}, but the run in this folder has {was!r}; {rule}; use another --workdir")
    return lines


def refuse_other_run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes ``config.json``; a folder that holds another run is refused, naming what differs."""
    path = workdir / "config.json"
    if path.exists() and (faults := diff_that_matters(from_json(path.read_text()), config)):
        raise InputError("\n".join(faults))
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json(config))
    os.replace(temporary, path)  # a process that is killed here leaves no half of a file


def finish(workdir: pathlib.Path) -> None:
    """Draws the curve and says how far the reward rose and where everything is."""
    rows = metrics.read_metrics(workdir)
    metrics.plot_curve(workdir / "reward.png", {workdir.name: rows})
    first, last = rows[0], rows[-1]
    rise = last["reward/mean"] - first["reward/mean"]
    logging.info(
        "reward %.4g -> %.4g (%+.4g: %+.2f standard deviations of the first epoch) in %d queries. "
        "In %s: reward.png, samples/, metrics.jsonl, TensorBoard events, checkpoints/",
        *(first["reward/mean"], last["reward/mean"], rise, rise / max(first["reward/std"], 1e-12)),
        *(last["reward_queries"], workdir),
    )


class Signals:
    """Notes SIGTERM and SIGINT so that the epoch in progress can finish; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Interrupted(number, "stopped at once; the last saved epoch stands")
        self.received = number
        logging.warning("received %s: saving after this epoch; once more stops at once", signal.Signals(number).name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
