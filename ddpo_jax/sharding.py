"""The device mesh and where arrays live on it.

Two axes, both carrying samples: ``data`` replicates the parameters, ``fsdp`` also splits them at rest (each device
keeps a slice and gathers the whole for the time of a computation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddpo_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)
_MIN_SHARDED_SIZE = 2**14  # smaller arrays are not worth a gather


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of ``data x fsdp`` devices; ``data = -1`` takes all devices there are.

    Raises:
      InputError: if the devices present do not fit the request.
    """
    count, processes = jax.device_count(), jax.process_count()
    if fsdp < 1 or (data != -1 and data < 1):
        raise InputError(
            f"mesh: received data={data}, fsdp={fsdp}; sizes are positive (data may be -1: all devices); "
            "use data=-1, fsdp=1"
        )
    wanted = (count // fsdp if data == -1 else data) * fsdp
    if wanted > count or wanted == 0 or (data == -1 and count % fsdp):
        raise InputError(
            f"mesh: received data={data}, fsdp={fsdp}; their product must be at most the {count} devices present "
            "and fsdp must divide them; use data=-1, fsdp=1"
        )
    if processes > 1 and wanted < count:
        raise InputError(
            f"mesh: received data={data}, fsdp={fsdp}; a run of {processes} processes takes all {count} devices; "
            f"use data=-1, and sample.batch_size and train.batch_size that {count} divides"
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))  # as ``hosts.rows`` counts
    return Mesh(np.asarray(devices[:wanted]).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def param_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """How one parameter is split at rest: its largest dimension that ``fsdp`` divides, or not at all."""
    if fsdp == 1 or np.prod(shape) < _MIN_SHARDED_SIZE:
        return P()
    sizes = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if not sizes:
        return P()
    _, axis = max(sizes)
    return P(*[None] * axis, "fsdp")


def param_specs(params: Any, mesh: Mesh) -> Any:
    """``param_spec`` of every leaf."""
    return jax.tree.map(lambda x: param_spec(x.shape, mesh.shape["fsdp"]), params)


def put_params(params: Any, mesh: Mesh) -> Any:
    """Parameters (or optimizer state) on the mesh, split at rest; shapes in their place become shapes of such."""
    return jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), params, param_specs(params, mesh))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with a leading sample axis, split over all devices; each process gives its own (``hosts.rows``)."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def own(batch: Any) -> Any:
    """The samples of a batch that are on this process's devices, still there; the opposite of ``put_batch``."""

    def local(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable:
            return x
        parts = {shard.device: shard.data for shard in x.addressable_shards}
        devices = [device for device in _mesh_of(x).devices.flat if device in parts]
        mesh = Mesh(np.asarray(devices), "samples")
        shape = (sum(len(part) for part in parts.values()), *x.shape[1:])
        pieces = [parts[device] for device in devices]
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P("samples")), pieces)

    return jax.tree.map(local, batch)


def whole(batch: jax.Array) -> jax.Array:
    """All samples of a batch on one device of this process, once they are computed."""
    if batch.is_fully_addressable:
        return batch
    everywhere = NamedSharding(_mesh_of(batch), P())
    return jax.jit(lambda x: x, out_shardings=everywhere)(batch).addressable_data(0)


def _mesh_of(x: Any) -> Mesh:
    """The mesh that an array of this module is on."""
    return x.sharding.mesh


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a small array, in every process."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The whole of every array on every device; shapes in their place become shapes of such."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, P())), tree)


def _put(x: Any, where: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    if where.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, where)
    x = np.asarray(x)  # every process has it
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def gather_params(params: Any, specs: Any) -> Any:
    """Inside ``shard_map``: the whole parameters from their slices."""

    def gather(x: jax.Array, spec: P) -> jax.Array:
        axes = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        return jax.lax.all_gather(x, "fsdp", axis=axes[0], tiled=True) if axes else x

    return jax.tree.map(gather, params, specs)


def scatter_grads(grads: Any, specs: Any) -> Any:
    """Inside ``shard_map``: gradients summed over all devices, each device keeping the slice it owns."""

    def scatter(x: jax.Array, spec: P) -> jax.Array:
        axes = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        if not axes:
            return jax.lax.psum(x, BATCH_AXES)
        if jax.default_backend() == "cpu" and jax.process_count() > 1:
            # psum_scatter over processes gives wrong numbers there, now and then and without a word: jax issue 40830,
            # seen with jax 0.10.2 and parts of 4 MiB (tests/hosts/test_collectives.py).
            size = x.shape[axes[0]] // jax.lax.axis_size("fsdp")
            whole = jax.lax.psum(x, BATCH_AXES)
            return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("fsdp") * size, size, axes[0])
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axes[0], tiled=True)
        return jax.lax.psum(x, "data")

    return jax.tree.map(scatter, grads, specs)


def per_device(
    function: Callable[..., Any], mesh: Mesh, num_params: int, in_specs: Sequence[P], out_specs: Any
) -> Callable[..., Any]:
    """``function`` run by every device on its own samples and on whole parameters.

    Args:
      function: its first ``num_params`` arguments are trees of parameters, which arrive split at rest.
      mesh: of the devices.
      num_params: see above.
      in_specs: of the remaining arguments.
      out_specs: of the result.
    """

    def call(*args: Any) -> Any:
        specs = tuple(param_specs(tree, mesh) for tree in args[:num_params])

        def local(*args: Any) -> Any:
            whole = map(gather_params, args[:num_params], specs)
            return function(*whole, *args[num_params:])

        # check_vma: a scan's carry starts replicated and becomes per-device, and gradients stay per device until
        # ``scatter_grads`` sums them, once per update.
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(*specs, *in_specs), out_specs=out_specs, check_vma=False)
        return sharded(*args)

    return call
