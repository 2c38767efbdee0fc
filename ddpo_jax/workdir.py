"""The folder of a run: its config, its checkpoints, and what stands there at the end."""

from __future__ import annotations

import os
import pathlib
import signal
from types import FrameType, TracebackType
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from ddpo_jax import checkpoint, metrics
from ddpo_jax import config as configs
from ddpo_jax.build import Parts
from ddpo_jax.errors import Interrupted
from ddpo_jax.keys import flatten
from ddpo_jax.learner import TrainState
from ddpo_jax.ops.advantages import PromptStats

# What a resumed run may change, besides log.* and mesh.*.
FREE = (
    *("checkpoint.every", "checkpoint.keep", "train.microbatch_size"),
    # Where a reward is asked and how long it is waited for; what it says is taken to be the same there.
    *("reward.url", "reward.token", "reward.timeout_s", "reward.patience_s"),
    *("reward.host", "reward.port", "reward.lease_s"),
)


def diff_that_matters(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What forbids to go on with a run: one line for each key whose change would make another run of it.

    ``num_epochs`` may grow; ``log.*``, ``mesh.*`` and ``FREE`` may change: on other devices a run goes on with the same
    numbers up to rounding.

    Args:
      old: the config the run was started with.
      new: the config of this command, resolved in the same way.
    """
    before, after = (flatten(configs.from_json(configs.to_json(config))) for config in (old, new))  # tuples in both
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
    if path.exists() and (faults := diff_that_matters(configs.from_json(path.read_text()), config)):
        raise ValueError("\n".join(faults))
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(configs.to_json(config))
    os.replace(temporary, path)  # a process that is killed here leaves no half of a file


def saved_arrays(parts: Parts, state: TrainState, stats: PromptStats) -> dict[str, Any]:
    """Everything that a run needs to go on, beside its config and the number of its epoch."""
    return {"state": state, "prompt_stats": stats.state_dict(), "replay": parts.replay.state_dict()}


def save(
    saver: checkpoint.Checkpointer,
    parts: Parts,
    state: TrainState,
    stats: PromptStats,
    epochs: int,
    reward: float,
    force: bool,
) -> None:
    """Starts saving the state after ``epochs`` finished epochs, if it is their turn or ``force`` is set."""
    saver.save(epochs, saved_arrays(parts, state, stats), {}, reward, force)


def restore(saver: checkpoint.Checkpointer, parts: Parts, stats: PromptStats) -> tuple[TrainState, int]:
    """``(state, finished epochs)`` of the latest checkpoint, or the initial state and 0."""
    state = parts.init()
    found = saver.restore(saved_arrays(parts, state, stats))
    if found is None:
        return state, 0
    epochs, arrays, _ = found
    stats.load_state_dict(arrays["prompt_stats"])
    parts.replay.load_state_dict(arrays["replay"])
    return arrays["state"], epochs


def show_fixed(writer: metrics.Writer, parts: Parts, config: ConfigDict, state: TrainState, epochs: int) -> None:
    """Shows what the policy after ``epochs`` epochs makes of the run's fixed prompts, unless no images are wanted."""
    if config.log.images_every:
        images, prompts = parts.collector.fixed(state.params, parts.model.frozen, parts.uncond, config.log.num_images)
        writer.fixed(epochs, images, prompts)


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
