"""Checks of an algorithm's own options, so that a wrong value is one clear line instead of a wrong run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddpo_jax.errors import InputError


def check(
    config: Mapping[str, Any],
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    positive: Sequence[str] = (),
    non_negative: Sequence[str] = (),
) -> None:
    """Raise one InputError with a line for every option outside its rule.

    Args:
      config: the algorithm's options.
      choices: allowed strings of the options that name an alternative.
      positive: options that must be above 0.
      non_negative: options that must be 0 or above.
    """
    faults = [
        fault(config, key, f"it must be one of {', '.join(allowed)}", repr(allowed[0]))
        for key, allowed in (choices or {}).items()
        if config[key] not in allowed
    ]
    faults += [fault(config, key, "it must be above 0", "the default") for key in positive if not config[key] > 0]
    faults += [fault(config, key, "it must be 0 or above", "0") for key in non_negative if not config[key] >= 0]
    if faults:
        raise InputError("\n".join(faults))


def fault(config: Mapping[str, Any], key: str, rule: str, use: str) -> str:
    """One line: key, value received, rule, fix."""
    return f"algorithm.{key}: received {config[key]!r}; {rule}; use {use}"
