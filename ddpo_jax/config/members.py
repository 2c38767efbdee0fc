"""The chosen member of every family, looked up by name once and then passed on."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import errors, find
from ddpo_jax.config.defaults import FAMILIES


@dataclasses.dataclass(frozen=True)
class Members:
    """Modules of the families, or the user's own function where the name ends in ``:function`` (reward, prompts)."""

    algorithm: Any
    weighting: Any
    replay: Any
    reward: Any
    prompts: Any

    def traits(self, config: ConfigDict) -> Any:
        """``types.Traits`` of the algorithm with the options of ``config.algorithm``.

        Raises:
          InputError: an option of the algorithm is wrong.
        """
        name = f"algorithm.name={config.algorithm.name}: traits()"
        return errors.plug_in(name, self.algorithm.traits, config.algorithm)


def look_up(config: ConfigDict) -> Members:
    """The members that a config names; ``prompts.name`` may not be "auto" any more.

    Raises:
      InputError: there is no such member.
    """
    return Members(**{section: find.find(package, config[section].name) for section, package in FAMILIES.items()})
