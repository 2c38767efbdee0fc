"""The replay buffer: scored trajectories of the last epochs, and the choice of which to train on again.

Every process holds the trajectories it drew; the choice is made of all and everywhere the same.

Source: "Selective Timestep Weighting" (anonymous), section 4.3 and Algorithm 1. After an epoch's own updates the best k
trajectories per device come back, or as many as there are, with the advantages and log-probabilities they were sampled
with. Then the epoch enters the buffer and what is too old leaves it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.hosts import rows as hosts
from ddpo_jax.types import ScoredSamples, Spread

SOURCES = ("past", "current", "nothing")
_FIELDS = tuple(field.name for field in dataclasses.fields(ScoredSamples))
_DTYPES = {name: np.dtype(np.int64 if name.endswith("_ids") else np.float32) for name in _FIELDS}


class Buffer:
    """Keeps the samples of the last ``config.history`` epochs and retrieves those that ``rule`` puts first."""

    def __init__(self, rule: types.ModuleType, config: ConfigDict, *, whole_groups: bool, num_devices: int):
        """Args:
        rule: a module of ``ddpo_jax.replay`` (``SOURCE`` and ``priority``), or the user's own.
        config: the ``replay`` section: ``name``, ``k``, ``history``, ``max_gib`` and the options of the rule.
        whole_groups: whether the samples of one draw of a prompt come back together or not at all.
        num_devices: of the run; ``k`` samples come back for each device.

        Raises:
          InputError: the rule's ``SOURCE`` is missing or unknown.
        """
        self._source = getattr(rule, "SOURCE", None)
        if self._source not in SOURCES:
            raise InputError(
                f"replay.name: received {config.name!r}, whose SOURCE is {self._source!r}; "
                f"it must be one of {', '.join(SOURCES)}; add a line SOURCE = 'past' to the module"
            )
        self._rule, self._config, self._whole_groups = rule, config, whole_groups
        self.count = config.k * num_devices  # how many samples come back where there are as many
        self._epochs: list[tuple[int, ScoredSamples]] = []  # oldest first

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(x.nbytes for _, samples in self._epochs for x in jax.tree.leaves(samples))

    def __len__(self) -> int:
        """Number of samples held."""
        return sum(len(samples) for _, samples in self._epochs)

    def retrieve(self, current: ScoredSamples, epoch: int, rng: np.random.Generator) -> ScoredSamples | None:
        """The ``k * num_devices`` samples of the highest priority, best first (with whole groups, best group first).

        Args:
          current: the epoch just sampled, with its advantages.
          epoch: the number of that epoch.
          rng: what rules that choose at random draw from.

        Returns:
          The samples; all there are where these are fewer, and None where there is none (the first epoch).

        Raises:
          InputError: the rule's priorities are not N numbers, or the groups do not fit ``k``.
        """
        if self._source == "nothing":
            return None
        entries = self._epochs if self._source == "past" else [(epoch, current)]
        if not sum(len(entry) for _, entry in entries):
            return None
        samples = _concatenate([entry for _, entry in entries])
        age = np.concatenate([np.full(len(entry), epoch - sampled) for sampled, entry in entries])
        priority = self._priority(samples, age, rng)
        chosen = self._groups(samples.group_ids, priority) if self._whole_groups else _descending(priority)
        return samples[chosen[: self.count]] if len(chosen) else None

    def add(self, current: ScoredSamples, epoch: int) -> None:
        """Takes in the samples of ``epoch`` and drops those that the next epoch finds older than ``history``.

        What is held stays within ``max_gib``: whole epochs leave, the oldest first.

        Raises:
          InputError: the samples of this epoch alone are more than that.
        """
        if self._source != "past":
            return
        self._epochs = [entry for entry in self._epochs if epoch - entry[0] < self._config.history]
        if not len(current):  # an algorithm that selects may have kept nothing
            return
        fields: Any = {name: value if isinstance(value, Spread) else np.asarray(value, _DTYPES[name])
                       for name, value in vars(current).items()}  # fmt: skip
        self._epochs.append((epoch, ScoredSamples(**fields)))
        while self.nbytes > self._config.max_gib * 2**30:
            if len(self._epochs) == 1:
                raise InputError(
                    f"replay.max_gib: received {self._config.max_gib:g}; the samples of one epoch take "
                    f"{self.nbytes / 2**30:.3g} GiB; allow more, or use replay.name=none"
                )
            dropped, _ = self._epochs.pop(0)
            logging.log_first_n(
                logging.WARNING,
                "replay.max_gib=%g is full: epoch %d leaves the buffer before replay.history=%d",
                *(1, self._config.max_gib, dropped, self._config.history),
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue: of each field its values and its shape without the leading axis, and
        the epoch of each sample. The arrays are flat, and their lengths alone depend on the content, so that the state
        of an empty buffer is a pattern for that of a full one.

        Of several processes the samples stand in the order of ``hosts.rows.shelf``; the epoch of a filling is -1.
        """
        state: dict[str, Any] = {"epochs": np.zeros(0, np.int64)}
        for name, dtype in _DTYPES.items():
            state |= {name: np.zeros(0, dtype), f"{name}_shape": np.zeros(0, np.int64)}
        if not self._epochs:
            return state
        samples = _concatenate([entry for _, entry in self._epochs])
        epochs = np.array([epoch for epoch, entry in self._epochs for _ in range(len(entry))], np.int64)
        order = hosts.shelf(samples.latents)
        state["epochs"] = np.where(order < 0, -1, epochs[order]) if isinstance(order, np.ndarray) else epochs
        for name in _FIELDS:
            value = getattr(samples, name)
            state |= {name: hosts.shelved(value, order), f"{name}_shape": np.array(value.shape[1:], np.int64)}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the content by what ``state_dict`` returned."""
        epochs = np.asarray(state["epochs"])
        fields = {}
        for name in _FIELDS if len(epochs) else ():
            shape = np.asarray(state[f"{name}_shape"]).tolist()
            fields[name] = np.asarray(state[name]).reshape(len(epochs), *shape)
        self._epochs = [
            (int(epoch), _claimed(ScoredSamples(**fields)[epochs == epoch])) for epoch in np.unique(epochs[epochs >= 0])
        ]

    def _priority(self, samples: ScoredSamples, age: Int[np.ndarray, " N"], rng: np.random.Generator) -> np.ndarray:
        given = self._rule.priority(samples.rewards, samples.advantages, age, rng, self._config)
        priority = np.asarray(given, np.float64)
        if priority.shape != age.shape or np.isnan(priority).any():
            what = f"shape {list(priority.shape)}" if priority.shape != age.shape else "NaN"
            raise InputError(
                f"replay.name: received {self._config.name!r}, whose priority() returned {what}; "
                f"it must return {len(age)} numbers, one per sample; correct the module"
            )
        return priority

    def _groups(self, group_ids: Int[np.ndarray, " N"], priority: Float[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
        """Indices of the samples, group by group, in descending order of each group's best priority."""
        _, group, sizes = np.unique(group_ids, return_inverse=True, return_counts=True)
        if (sizes != sizes[0]).any() or self.count % sizes[0]:
            raise InputError(
                f"replay.k: received {self._config.k}, {self.count} samples over all devices; it must come out in "
                f"whole groups of {sizes.max()} samples of a prompt; use a multiple of {sizes.max()}"
            )
        best = np.full(len(sizes), -np.inf)
        np.maximum.at(best, group, priority)
        members = np.argsort(group, kind="stable").reshape(len(sizes), sizes[0])
        return members[_descending(best)].reshape(-1)


def _descending(priority: Float[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Indices from the highest priority down, equal ones in their order; those of minus infinity are left out."""
    order = np.argsort(-priority, kind="stable")
    return order[priority[order] > -np.inf]


def _concatenate(parts: list[ScoredSamples]) -> ScoredSamples:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: hosts.concatenate(leaves), *parts)


def _claimed(samples: ScoredSamples) -> ScoredSamples:
    """Samples that every process has read: of what is big each keeps its part."""
    return dataclasses.replace(samples, latents=hosts.claim(samples.latents), context=hosts.claim(samples.context))
