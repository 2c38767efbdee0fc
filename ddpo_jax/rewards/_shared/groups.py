"""Rewards that compare the images of a prompt with each other: they get whole groups, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared.check import Parts, RewardError, RewardFn, call


def in_groups(fn: RewardFn, size: int, name: str) -> RewardFn:
    """``fn`` as a function of batches, in which every ``size`` images in a row are all those of one draw of a prompt.

    Args:
      fn: a reward. One that is not ``groupwise`` is returned as it is.
      size: K. 1 where images come from prompts of their own.
      name: of the reward, for messages.

    Raises:
      InputError: the reward is group-wise, and there is nothing to compare.
    """
    if not getattr(fn, "groupwise", False):
        return fn
    if size < 2:
        raise InputError(
            f"reward {name!r} compares the images of a prompt with each other and needs 2 or more of each; here they "
            "come one by one. In training prompts.samples_per_prompt=4 brings 4"
        )
    return _InGroups(fn, size, name)


class _InGroups:
    """Calls ``fn`` group by group; otherwise it is ``fn``."""

    def __init__(self, fn: Any, size: int, name: str):
        self._fn, self._size, self._name = fn, size, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._fn, attribute)

    def __call__(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[np.ndarray, Parts]:
        found = []
        for start in range(0, len(prompts), self._size):
            rows = slice(start, start + self._size)
            if len(prompts[rows]) < self._size or len(set(prompts[rows])) > 1:
                raise RewardError(f"reward {self._name!r} got {prompts[rows]!r:.200}, not {self._size} of one prompt")
            found.append(call(self._fn, images[rows], prompts[rows], metadata[rows], self._name))
        return joined(found)


def joined(batches: list[tuple[np.ndarray, Parts]]) -> tuple[np.ndarray, Parts]:
    """Scores and parts of several batches, one after the other; a part that a batch does not have is NaN there."""
    names = dict.fromkeys(name for _, parts in batches for name in parts)
    missing = [np.full(len(scores), np.nan, np.float32) for scores, _ in batches]
    return np.concatenate([scores for scores, _ in batches]), {
        name: np.concatenate([parts.get(name, nan) for (_, parts), nan in zip(batches, missing, strict=True)])
        for name in names
    }
