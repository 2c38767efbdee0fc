"""Checks of an algorithm's own options, so that a wrong value is one clear line instead of a wrong run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check(
    config: Mapping[str, Any],
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    positive: Sequence[str] = (),
    non_negative: Sequence[str] = (),
) -> None:
    """Raise one ValueError that lists every option outside its rule.

    Args:
      config: the algorithm's options.
      choices: allowed strings of the options that name an alternative.
      positive: options that must be > 0.
      non_negative: options that must be >= 0.
    """
    faults = [
        f"algorithm.{key}={config[key]!r} is not an alternative; use one of {', '.join(allowed)}"
        for key, allowed in (choices or {}).items()
        if config[key] not in allowed
    ]
    faults += [f"algorithm.{key}={config[key]!r} must be > 0" for key in positive if not config[key] > 0]
    faults += [f"algorithm.{key}={config[key]!r} must be >= 0" for key in non_negative if not config[key] >= 0]
    if faults:
        raise ValueError("; ".join(faults))
