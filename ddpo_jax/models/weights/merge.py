"""Strict merging: every parameter gets its tensor and every tensor its parameter, or the names that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ddpo_jax.errors import InputError

Shape = tuple[int, ...]
KeyMap = Callable[[str, Shape], tuple[str, tuple[int, ...]]]

_MAX_LISTED = 8


def merge(
    target_shapes: Mapping[str, Shape], tensors: Mapping[str, np.ndarray], keymap: KeyMap, *, where: str
) -> dict[str, np.ndarray]:
    """Gives every parameter its tensor, and every tensor its parameter, or says what does not fit.

    Args:
      target_shapes: our parameter name -> its shape.
      tensors: upstream tensor name -> array.
      keymap: (our name, our shape) -> (upstream name, permutation that takes upstream axes to ours).
      where: what is being loaded, for the message.

    Returns:
      our name -> f32 array of our shape (a view of the memory map where nothing had to be converted).

    Raises:
      InputError: listing missing, unexpected and wrongly shaped tensors by name.
    """
    found: dict[str, np.ndarray] = {}
    missing, misshapen, used = [], [], set()
    for ours, shape in target_shapes.items():
        name, axes = keymap(ours, shape)
        if name in used:
            raise InputError(f"{where}: two parameters map to the tensor {name!r}")
        used.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        value = tensors[name]
        wanted = tuple(shape[axes.index(i)] for i in range(len(axes)))
        if value.shape != wanted:
            misshapen.append(f"{name} {list(value.shape)} instead of {list(wanted)}")
            continue
        found[ours] = value.transpose(axes).astype(np.float32, copy=False)
    faults = {"missing": missing, "unexpected": [n for n in tensors if n not in used], "of wrong shape": misshapen}
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise InputError(f"{where}: the tensors do not fit the model: {text}")
    return found


def listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", and {more} more" if more > 0 else "")
