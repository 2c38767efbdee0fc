"""Trees of arrays as a checkpoint holds them: every leaf by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddpo_jax.errors import InputError


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path in it, such as ``state/params/conv_in.bias``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def to_stored(tree: Any) -> dict[str, Any]:
    """What orbax writes: arrays without elements are left out, because it refuses them."""
    stored: dict[str, Any] = {}
    for name, leaf in flatten(tree).items():
        if not isinstance(leaf, jax.Array):
            leaf = np.array(leaf)  # a copy: the caller may go on writing into its own
        elif leaf.is_fully_replicated and jax.process_count() == 1:
            leaf = leaf.addressable_data(0)  # of a replicated array orbax has every device cut and write a slice
        if leaf.size:
            stored[name] = leaf
    return stored


def to_host(leaf: Any) -> Callable[[], Any]:
    """A function that gives ``leaf`` back as it is now; a jax array is kept in host memory until then."""
    if not isinstance(leaf, jax.Array):
        return lambda: leaf
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        whole = np.array(leaf)
        return lambda: whole
    parts = {str(shard.index): np.array(shard.data) for shard in leaf.addressable_shards}
    shape, where = leaf.shape, leaf.sharding
    return lambda: jax.make_array_from_callback(shape, where, lambda index: parts[str(index)])


def is_empty(leaf: Any) -> bool:
    """Whether a leaf is a host array without elements, such as an empty buffer."""
    return not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and np.size(leaf) == 0


def restore_args(leaf: Any) -> ocp.RestoreArgs:
    """How orbax gives ``leaf`` back: a jax array with its sharding, or a numpy array."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding)


def compare(folder: epath.Path, wanted: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises InputError that lists what is missing, left over, or of another shape or dtype."""
    faults = [f"missing: {name}" for name in wanted if name not in stored]
    faults += [f"unexpected: {name}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        leaf = wanted[name]
        on_device = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        leaf = leaf if on_device else np.asarray(leaf)
        shape, dtype = stored[name]
        free = 0 if on_device or not leaf.ndim else 1  # a host array's leading length (a replay buffer) may differ
        if (len(shape), shape[free:], dtype) != (leaf.ndim, leaf.shape[free:], leaf.dtype):
            faults.append(f"{name}: stored {dtype}{list(shape)}, expected {leaf.dtype}{list(leaf.shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise InputError(f"checkpoint {folder} is of another configuration: {shown}. Use another --workdir.")
