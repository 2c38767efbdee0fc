"""Which process has which rows of N samples, and the rows that have to move.

In a batch of n samples on the devices, process p has the p-th of equal parts. So as to move little, an epoch's samples
are numbered such that a process draws a contiguous block of them, and the samples of an update are put into an order
in which most are where they were drawn: the order within an update changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ddpo_jax.hosts.exchange import gather
from ddpo_jax.types import HostArray, Spread

Samples = TypeVar("Samples")


def own(n: int) -> slice:
    """The rows of this process in a batch of n."""
    size = n // jax.process_count()
    return slice(size * jax.process_index(), size * (jax.process_index() + 1))


def batches(n: int, batch_size: int) -> list[Int[np.ndarray, " B"]]:
    """The numbers of n samples, batch by batch; over all batches each process has a contiguous block of them."""
    table = np.arange(n, dtype=np.int32).reshape(jax.process_count(), -1)
    size = batch_size // jax.process_count()
    return [table[:, start : start + size].reshape(-1) for start in range(0, table.shape[1], size)]


def spread(array: np.ndarray) -> HostArray:
    """All samples, of which each process gives an equal number: process 0 the first, and so on."""
    return _spread(np.repeat(np.arange(jax.process_count()), len(array)), array)


def claim(array: Any) -> HostArray:
    """Samples that every process has; each keeps a part of them."""
    owner = np.arange(len(array)) * jax.process_count() // max(len(array), 1)
    return _spread(owner, array[owner == jax.process_index()].copy() if jax.process_count() > 1 else array)


def _spread(owner: Int[np.ndarray, " N"], own_rows: np.ndarray) -> HostArray:
    if jax.process_count() == 1:
        return own_rows
    rows = np.full(len(owner), None)
    for number, row in zip(np.flatnonzero(owner == jax.process_index()), own_rows, strict=True):
        rows[number] = row
    return Spread(owner, rows, own_rows.shape[1:], own_rows.dtype)


def concatenate(parts: Sequence[Any]) -> HostArray:
    """The samples of all parts, one part after the other."""
    first = parts[0]
    if not isinstance(first, Spread):
        return np.concatenate(parts)
    owner, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ("owner", "rows"))
    return Spread(owner, rows, first.shape[1:], first.dtype)


def settled(samples: Samples) -> Samples:
    """The same samples in an order in which as many as possible are in the process whose device gets them."""
    spreads = [leaf for leaf in jax.tree.leaves(samples) if isinstance(leaf, Spread)]
    if not spreads:
        return samples
    owner, count = spreads[0].owner, jax.process_count()
    size = len(owner) // count
    order, homeless = np.full(len(owner), -1), list[int]()
    for process in range(count):
        mine = np.flatnonzero(owner == process)
        order[process * size :][: min(size, len(mine))] = mine[:size]
        homeless.extend(mine[size:])
    order[order < 0] = homeless
    return jax.tree.map(lambda leaf: leaf[order], samples)


def home(samples: Samples) -> Samples:
    """This process's rows of samples that a batch on the devices is made of; those that are elsewhere are sent.

    Args:
      samples: a tree of arrays [N, ...], whole in every process or ``Spread``; all processes call it with the same.
    """
    if jax.process_count() == 1:
        return samples
    return jax.tree.map(lambda x: _received(x) if isinstance(x, Spread) else x[own(len(x))], samples)


def _received(x: Spread) -> np.ndarray:
    """The rows that ``own`` gives to this process: one row of every process is on the way at a time."""
    count, me = jax.process_count(), jax.process_index()
    target, found = np.arange(len(x)) // (len(x) // count), x.rows.copy()
    moving = [np.flatnonzero((x.owner == process) & (target != process)) for process in range(count)]
    nothing = np.zeros(x.shape[1:], x.dtype)
    for turn in range(max(map(len, moving))):
        sent = [int(rows[turn]) if turn < len(rows) else None for rows in moving]
        with jax.transfer_guard_host_to_device("allow"):
            arrived = multihost_utils.process_allgather(nothing if sent[me] is None else x.rows[sent[me]])
        for process, row in enumerate(sent):
            if row is not None and target[row] == me:
                found[row] = arrived[process]
    return np.stack(list(found[own(len(x))]))


def whole(x: HostArray) -> np.ndarray:
    """All rows, in every process. For a few samples, such as images to look at."""
    if not isinstance(x, Spread):
        return x
    found: dict[int, Any] = {}
    for part in gather({number: row for number, row in enumerate(x.rows) if row is not None}):
        found |= part
    return np.stack([found[number] for number in range(len(x))])


def shelf(x: HostArray) -> Int[np.ndarray, " M"] | slice:
    """The order in which a checkpoint holds the samples: those of process 0, those of process 1, and so on.

    Each process's are filled up with -1 to the same number. All as they are where they are not spread.
    """
    if not isinstance(x, Spread):
        return slice(None)
    parts = [np.flatnonzero(x.owner == process) for process in range(jax.process_count())]
    size = max(map(len, parts))
    return np.concatenate([np.pad(part, (0, size - len(part)), constant_values=-1) for part in parts])


def shelved(x: HostArray, order: Any) -> np.ndarray | jax.Array:
    """The samples in the order of ``shelf``, flat; of a ``Spread`` each process gives its own to one array of all."""
    if not isinstance(x, Spread):
        return x[order].reshape(-1)
    nothing = np.zeros(x.shape[1:], x.dtype)
    mine = np.stack([nothing if row < 0 else x.rows[row] for row in order[own(len(order))]])
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[process] for process in sorted(firsts)]), "process")
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), mine.reshape(-1))
