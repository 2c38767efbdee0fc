"""What the processes of a run tell each other. Every function here is called by all of them at the same point."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpo_jax.errors import InputError


def is_first() -> bool:
    """Whether this is process 0, which alone writes files, asks people and servers, and shows progress."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """``value`` of every process, by number. It is pickled: numpy keeps its 64 bits. For what is small."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    with jax.transfer_guard_host_to_device("allow"):
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        room = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few lengths, so few programs are compiled
        room[: len(data)] = data
        rows = multihost_utils.process_allgather(room)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Around what one process may fail at: if one does, all raise the same, and none waits for it in vain.

    Args:
      kinds: the exceptions this is about; each is made of one text. Anything else ends its own process alone.
    """
    fault, cause = None, None
    try:
        yield
    except kinds as error:
        if jax.process_count() == 1:
            raise
        kind = next(number for number, kind in enumerate(kinds) if isinstance(error, kind))
        where = "" if is_first() else f"process {jax.process_index()}: "
        fault, cause = (kind, f"{where}{error}"), error
    for found in filter(None, gather(fault)):
        raise kinds[found[0]](found[1]) from cause


def require_same(what: str, text: str) -> None:
    """Refuses a run whose processes were started differently.

    Raises:
      InputError: ``text`` differs between them.
    """
    lines = [set(found.splitlines()) for found in gather(text)]
    for number, found in enumerate(lines):
        if found != lines[0]:
            differing = ", ".join(line.strip(" ,") for line in sorted(found ^ lines[0]))
            raise InputError(
                f"{what}: process {number} was started with another than process 0: {differing:.300}; start all "
                "processes by the same command"
            )
