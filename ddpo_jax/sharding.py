"""The device mesh and where arrays live on it.

Two axes, both carrying samples: ``data`` replicates the parameters, ``fsdp`` also splits them at rest (each device
keeps a slice and gathers the whole for the time of a computation). Which dimension is split, rules say by the name of
the parameter (``mesh.rules``); optimizer state, averages and reference have the same names and follow.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
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
    return mesh_of(devices[:wanted], fsdp)


def mesh_of(devices: Sequence[Any], fsdp: int) -> Mesh:
    """The mesh of all these devices, in their order; they need not be there. ``fsdp`` divides their number."""
    return Mesh(np.asarray(devices).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the parameters whose name a regular expression finds are split at rest.

    Attributes:
      text: as it was given.
      pattern: searched for in the dotted name.
      where: the dimension to split; "largest": the largest that divides, or none; "none": every device has the whole.
    """

    text: str
    pattern: re.Pattern[str]
    where: int | str


DEFAULT_RULES = (Rule(".*=largest", re.compile(".*"), "largest"),)


def read_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules from ``PATTERN=WHERE``, see ``Rule``; the first whose pattern finds a name decides.

    Raises:
      InputError: one line for each that is no rule.
    """
    rules, faults = [], []
    for text in texts:
        pattern, equals, where = text.rpartition("=")
        known = where in ("largest", "none") or (where.isascii() and where.isdecimal())
        try:
            if not (equals and known):
                raise ValueError("no dimension")
            rules.append(Rule(text, re.compile(pattern), int(where) if where.isdecimal() else where))
        except (ValueError, re.error):
            faults.append(
                f"mesh.rules: received {text!r}; it must be PATTERN=WHERE, a regular expression and the number of a "
                "dimension, largest or none; use .*=largest"
            )
    if faults:
        raise InputError("\n".join(faults))
    return tuple(rules)


def check_rules(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], fsdp: int) -> None:
    """Makes sure that rules do what they say.

    Args:
      rules: see ``read_rules``.
      shapes: of all parameters by name, trained and frozen.
      fsdp: devices that share the parameters.

    Raises:
      InputError: one line for each rule that finds no name, or splits a dimension that does not divide.
    """
    faults, left = [], set(shapes)
    for rule in rules:
        names = [name for name in shapes if name in left and rule.pattern.search(name)]
        left -= {*names}
        if not names:
            near = difflib.get_close_matches(rule.pattern.pattern.replace("\\", ""), shapes, n=3, cutoff=0.3)
            faults.append(
                f"mesh.rules: received {rule.text!r}, which finds no parameter's name that rules before it leave; "
                f"nearest: {', '.join(near or list(shapes)[:3])}; correct it or leave it out"
            )
        elif isinstance(rule.where, int):
            wrong = [name for name in names if rule.where >= len(shapes[name]) or shapes[name][rule.where] % fsdp]
            if wrong:
                shape = list(shapes[wrong[0]])
                faults.append(
                    f"mesh.rules: received {rule.text!r}; mesh.fsdp={fsdp} must divide dimension {rule.where} of "
                    f"{wrong[0]} {shape}; use another dimension, or =largest"
                )
    if faults:
        raise InputError("\n".join(faults))


def param_spec(name: str, shape: tuple[int, ...], fsdp: int, rules: Sequence[Rule] = DEFAULT_RULES) -> P:
    """How one parameter is split at rest: by the first rule that finds its name; without one, not at all."""
    where = next((rule.where for rule in rules if rule.pattern.search(name)), "none")
    if fsdp == 1 or not shape or where == "none":
        return P()
    if isinstance(where, int):
        return P(*[None] * where, "fsdp")
    return _largest(shape, fsdp)


def _largest(shape: tuple[int, ...], fsdp: int) -> P:
    if np.prod(shape) < _MIN_SHARDED_SIZE:
        return P()
    sizes = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if not sizes:
        return P()
    _, axis = max(sizes)
    return P(*[None] * axis, "fsdp")


def param_specs(params: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """``param_spec`` of every leaf; its name is its last key that is text, so that AdamW's moments have it too."""

    def spec(path: tuple[Any, ...], x: Any) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return param_spec(names[-1] if names else "", x.shape, mesh.shape["fsdp"], rules)

    return jax.tree_util.tree_map_with_path(spec, params)


def put_params(params: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """Parameters (or optimizer state) on the mesh, split at rest; shapes in their place become shapes of such."""
    return jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), params, param_specs(params, mesh, rules))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with a leading sample axis, split over all devices; each process gives its own (``hosts.rows``)."""
    sharding = NamedSharding(mesh, BATCH)
    with jax.transfer_guard_host_to_device("allow"):  # this is the one way that is meant
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
    with jax.transfer_guard_host_to_device("allow"):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The whole of every array on every device; shapes in their place become shapes of such."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, P())), tree)


def _put(x: Any, where: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    traced = isinstance(x, jax.core.Tracer)
    if traced or where.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, where)
    x = np.asarray(x)  # every process has it
    with jax.transfer_guard_host_to_device("allow"):
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
    function: Callable[..., Any],
    mesh: Mesh,
    num_params: int,
    in_specs: Sequence[P],
    out_specs: Any,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Callable[..., Any]:
    """``function`` run by every device on its own samples and on whole parameters.

    Args:
      function: its first ``num_params`` arguments are trees of parameters, which arrive split at rest.
      mesh: of the devices.
      num_params: see above.
      in_specs: of the remaining arguments.
      out_specs: of the result.
      rules: by which the parameters are split.
    """

    def call(*args: Any) -> Any:
        specs = tuple(param_specs(tree, mesh, rules) for tree in args[:num_params])

        def local(*args: Any) -> Any:
            whole = map(gather_params, args[:num_params], specs)
            return function(*whole, *args[num_params:])

        # check_vma: a scan's carry starts replicated and becomes per-device, and gradients stay per device until
        # ``scatter_grads`` sums them, once per update.
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(*specs, *in_specs), out_specs=out_specs, check_vma=False)
        return sharded(*args)

    return call
