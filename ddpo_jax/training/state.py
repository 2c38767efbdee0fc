"""What a run saves of itself and goes on from."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.training.build import Parts
from ddpo_jax.training.learner import TrainState
from ddpo_jax.training.record import Record
from ddpo_jax.workdir import checkpoint


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
    saver.save(epochs, saved_arrays(parts, state, stats), reward, force)


def restore(saver: checkpoint.Checkpointer, parts: Parts, stats: PromptStats) -> tuple[TrainState, int]:
    """``(state, finished epochs)`` of the latest checkpoint, or the initial state and 0."""
    state = parts.init()
    found = saver.restore(saved_arrays(parts, state, stats))
    if found is None:
        return state, 0
    epochs, arrays = found
    stats.load_state_dict(arrays["prompt_stats"])
    parts.replay.load_state_dict(arrays["replay"])
    return arrays["state"], epochs


def show_fixed(record: Record, parts: Parts, config: ConfigDict, state: TrainState, epochs: int) -> None:
    """Shows what the policy after ``epochs`` epochs makes of the run's fixed prompts, unless no images are wanted."""
    if config.log.images_every:
        images, prompts = parts.collector.fixed(state.params, config.log.num_images)
        record.fixed(epochs, images, prompts)
