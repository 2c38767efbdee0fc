"""Calls a reward and checks what comes back: every reward's output, a user's included, passes through here once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

Parts = dict[str, Float32[np.ndarray, " N"]]
RewardFn = Callable[[np.ndarray, list[str], list[dict[str, Any]]], Any]


class RewardError(RuntimeError):
    """A reward could not be computed or is not usable; the message is one line."""


def call(
    fn: RewardFn,
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    name: str,
) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """``fn`` of a batch, checked by ``check``.

    Raises:
      RewardError: ``fn`` raised, or what it returned is not usable; in one line.
    """
    try:
        # Copies of the lists: the messages must show the prompts as they were.
        output = fn(images, list(prompts), [dict(entry) for entry in metadata])
    except RewardError:  # of a member of a weighted sum: it names the member
        raise
    except Exception as error:  # a reward may raise anything; its traceback is chained
        cause = " ".join(str(error).split())
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {cause}") from error
    return check(output, prompts, name)


def check(output: Any, prompts: Sequence[str], name: str) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """What a reward returned as (f32[N], parts).

    Args:
      output: N real numbers, or (N real numbers, {part: N real numbers}); anything numpy can read.
      prompts: the N prompts.
      name: of the reward, for messages.
    Raises:
      RewardError: wrong type, dtype or length; a score that is NaN or infinite (in float32). A part may be NaN.
    """
    parts: Any = {}
    if isinstance(output, tuple):
        if len(output) != 2 or not isinstance(output[1], Mapping):
            received = ", ".join(type(item).__name__ for item in output)
            raise RewardError(
                f"reward {name!r} returned a tuple of ({received}); "
                "it must return N scores, or (N scores, dict of parts)"
            )
        output, parts = output
    scores = _numbers(output, len(prompts), f"reward {name!r}")
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(np.argmin(finite))
        raise RewardError(
            f"reward {name!r} returned {scores[first]} for image {first} (prompt {prompts[first]!r}); "
            f"{np.sum(~finite)} of {len(scores)} scores are not finite; every score must be a finite number"
        )
    for part in parts:
        if not isinstance(part, str):
            raise RewardError(f"reward {name!r} returned a part named {part!r}; names of parts must be strings")
    return scores, {
        key: _numbers(value, len(prompts), f"reward {name!r}, part {key!r},") for key, value in parts.items()
    }


def _numbers(values: Any, length: int, what: str) -> np.ndarray:
    if values is None:
        raise RewardError(f"{what} returned None; it must return {length} scores, one per image")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:  # ragged lists, tensors of another framework that need a copy first
        cause = " ".join(str(error).split())
        raise RewardError(
            f"{what} returned a {type(values).__name__} that is not an array of numbers: {cause}"
        ) from error
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)  # bfloat16 included
    if not real:
        raise RewardError(f"{what} returned dtype {array.dtype}; it must return real numbers (float32)")
    if array.shape != (length,):
        raise RewardError(f"{what} returned shape {array.shape}; it must return shape ({length},), one score per image")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite by the caller
        return array.astype(np.float32)
