"""Networks of rewards: batches of one size, on the devices that share the policy's batches or on the host."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError, one_line

DEVICES = ("mesh", "host")  # of the option ``device``
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Rewards that are made meanwhile compute on the devices of ``mesh``; without one, on the first device."""
    before = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(before)


def places(device: str) -> list[jax.Device]:
    """The devices that the option ``device`` names, of this process: others have images of their own.

    Raises:
      InputError: there is no such choice, or JAX was started without the host's processors.
    """
    if device == "mesh":
        mesh = _mesh.get()
        return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    if device != "host":
        raise InputError(f"reward.device={device!r}: must be {' or '.join(DEVICES)}")
    try:
        return jax.local_devices(backend="cpu")[:1]
    except RuntimeError as error:
        raise InputError(
            f"reward.device='host': JAX does not use this machine's processors ({one_line(error)}); leave "
            "JAX_PLATFORMS unset or add ,cpu to it, or use reward.device=mesh"
        ) from error


def in_batches(
    model: nnx.Module,
    fn: Callable[..., Array],
    config: ConfigDict,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Callable[..., np.ndarray]:
    """``fn`` on the host, jitted: rows in batches of ``config.batch_size``, filled up with copies of a row.

    The devices share every batch, each with the whole network and without a word to the others. The host prepares a
    batch while they compute the one before; no more than those two are on them.

    Args:
      model: the networks, which move to the devices; their parameters are arguments of the compiled program, not
        constants in it.
      fn: (model, rows, further rows...) to rows, each computed on its own.
      config: ``batch_size`` is rows per call, over all devices, rounded up to a multiple of them; ``device`` is "mesh"
        (those of ``on_mesh``) or "host" (the processors of this machine).
      prepare: rows to rows, each on its own, on the host; of the first rows alone.
    Returns:
      (rows [N, ...], further rows [N, ...]...) to f32[N, ...], of any N > 0; another N does not compile again.

    Raises:
      InputError: the batch size is not positive, or there is no such device.
    """
    if config.batch_size < 1:
        raise InputError(f"reward.batch_size={config.batch_size} must be at least 1")
    mesh = Mesh(np.asarray(places(config.device)), ("data",))
    size = math.ceil(config.batch_size / mesh.size) * mesh.size
    split = NamedSharding(mesh, P("data"))
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    nnx.update(model, state)  # so that a second program of the model shares this copy, and none stays elsewhere

    def compute(state: Any, *rows: Array) -> Array:
        # Scores are published in float32. A reward network runs once per image, so this costs next to nothing.
        with jax.default_matmul_precision("highest"):
            return fn(nnx.merge(graphdef, state), *rows).astype(jnp.float32)

    @jax.jit
    def compiled(state: Any, *rows: Array) -> Array:
        # Nothing goes between devices: the thread of the policy launches programs of its own on them meanwhile.
        specs = (P(), *(P("data") for _ in rows))
        return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(state, *rows)

    def filled(batch: np.ndarray) -> Array:
        copies = np.broadcast_to(batch[:1], (size - len(batch), *batch.shape[1:]))
        return jax.device_put(np.concatenate([batch, copies]), split)

    def run(rows: np.ndarray, *further: np.ndarray) -> np.ndarray:
        done: list[Any] = []
        for start in range(0, len(rows), size):
            batch = slice(start, start + size)
            done.append(compiled(state, filled(prepare(rows[batch])), *(filled(more[batch]) for more in further)))
            if start:
                done[-2] = np.asarray(done[-2])  # waits for it
        return np.concatenate(done)[: len(rows)]

    return run
