"""A config that is complete, valid and frozen, with its members: known before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ddpo_jax.config.keys import put
from ddpo_jax.config.members import Members
from ddpo_jax.config.resolve import resolve
from ddpo_jax.config.validate import validate


@dataclasses.dataclass(frozen=True)
class Ready:
    """A resolved and valid config, frozen, and the members it names."""

    config: FrozenConfigDict
    members: Members

    def with_values(self, values: Mapping[str, Any]) -> Ready:
        """The same with some keys set, by dotted name: for programs beside a run, which nothing checks again."""
        config = ConfigDict(self.config)
        for key, value in values.items():
            put(config, key, value)
        return Ready(FrozenConfigDict(config), self.members)


def make_ready(config: ConfigDict, backend: str, num_devices: int) -> Ready:
    """Fills in what depends on the model and the machine, and refuses what cannot be trained.

    Args:
      config: left as it is.
      backend: ``jax.default_backend()``: "cpu", "gpu" or "tpu".
      num_devices: all devices of the run, over all processes.

    Raises:
      InputError: one line for each fault.
    """
    resolved, members = resolve(config, backend, num_devices)
    validate(resolved, members, num_devices)
    return Ready(FrozenConfigDict(resolved), members)
