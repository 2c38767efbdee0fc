"""Calls a reward and checks what comes back: every reward's output, a user's included, passes through here once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from ddpo_jax.errors import Interrupted, one_line

STATISTICS = ("mean", "std", "min", "max")  # of the whole reward, logged as reward/<name>
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
    except (RewardError, Interrupted, KeyboardInterrupt):  # of a member of a weighted sum: it names the member
        raise
    except BaseException as error:  # a reward may raise anything; its traceback is chained
        raise RewardError(f"reward {name!r} raised {one_line(error)}") from error
    return check(output, prompts, name)


def check(output: Any, prompts: Sequence[str], name: str) -> tuple[Float32[np.ndarray, " N"], Parts]:
    """What a reward returned as (f32[N], parts).

    Args:
      output: N real numbers, or (N real numbers, {part: N real numbers}); anything numpy can read, or PyTorch's
        tensors, wherever they are.
      prompts: the N prompts.
      name: of the reward, for messages.
    Raises:
      RewardError: wrong type, dtype or length; a score that is NaN or infinite (in float32). A part may be NaN.
    """
    parts: Any = {}
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        output, parts = output
    scores = _numbers(output, len(prompts), f"reward {name!r}")
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(np.argmin(finite))
        raise RewardError(
            f"reward {name!r} returned {scores[first]} for image {first} (prompt {prompts[first]!r:.80}); "
            f"{np.sum(~finite)} of {len(scores)} scores are not finite; every score must be a finite number"
        )
    try:
        named = list(parts.items())
    except Exception as error:  # a mapping of the user's own
        raise RewardError(f"reward {name!r} returned parts that cannot be read: {one_line(error)}") from error
    for part, _ in named:
        if not isinstance(part, str) or not part.isprintable():
            what = f"named {part!r:.80}" if isinstance(part, str) else f"whose name is a {type(part).__name__}"
            raise RewardError(f"reward {name!r} returned a part {what}; names of parts must be printable strings")
        if part in STATISTICS:
            raise RewardError(
                f"reward {name!r} returned a part named {part!r}, as which a statistic of the whole reward is logged; "
                "give it another name"
            )
    return scores, {
        part: _numbers(value, len(prompts), f"reward {name!r}, part {part!r:.80},") for part, value in named
    }


def _numbers(values: Any, length: int, what: str) -> np.ndarray:
    if values is None:
        raise RewardError(f"{what} returned None; it must return {length} scores, one per image")
    try:
        items = [_on_host(item) for item in values] if isinstance(values, list | tuple) else None
        many = isinstance(values, tuple) and any(np.ndim(item) for item in items or ())
        array = None if many else np.asarray(_on_host(values) if items is None else items)
    except Exception as error:  # ragged lists, an object whose own conversion fails
        kind = type(values).__name__
        raise RewardError(f"{what} returned a {kind} that is not an array of numbers: {one_line(error)}") from error
    if array is None:
        kinds = ", ".join(type(item).__name__ for item in values)
        raise RewardError(
            f"{what} returned a tuple of ({kinds}); it must return N scores, or (N scores, dict of parts)"
        )
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)  # bfloat16 included
    if not real:
        raise RewardError(f"{what} returned dtype {array.dtype}; it must return real numbers (float32)")
    if array.shape != (length,):
        raise RewardError(f"{what} returned shape {array.shape}; it must return shape ({length},), one score per image")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite by the caller
        return array.astype(np.float32)


def _on_host(value: Any) -> Any:
    """A tensor of PyTorch as numpy can read it, whose types do not have bfloat16; anything else as it is."""
    if not all(callable(getattr(value, method, None)) for method in ("detach", "cpu", "is_floating_point", "float")):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()
