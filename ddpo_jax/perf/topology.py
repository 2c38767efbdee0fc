"""What each chip of a slice holds and what the chips tell each other, by a compiler that needs none of them.

A program is compiled for all chips of a slice; bytes are those of one of them. The bytes of a collective are those of
the array it makes (all-gather, all-reduce, collective-permute, all-to-all) or takes (reduce-scatter): the whole, of
which a ring sends each chip nearly all (all-reduce: twice).
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ddpo_jax import sharding
from ddpo_jax.config.ready import Ready
from ddpo_jax.models.attention import compiling_for
from ddpo_jax.perf import capacity
from ddpo_jax.perf.random_model import Size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# An instruction of a compiled program: its result (an array, or a tuple of them), its name and what it takes.
_INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      name: "update" or "rollout".
      resident: bytes on one chip of what stays there from program to program.
      total: the most bytes on one chip while it runs, ``resident`` included.
      collectives: ``{kind: (how many, bytes)}`` of one run; those inside a loop would count once.
      seconds: that the compiler took.
    """

    name: str
    resident: int
    total: int
    collectives: dict[str, tuple[int, int]]
    seconds: float


def compile_programs(
    ready: Ready, size: Size, devices: Sequence[Any], progress: Callable[[str], None] = lambda line: None
) -> Iterator[Program]:
    """Compiles the update and the rollout of a run for many devices, which need not be there.

    Args:
      ready: of the run; its ``mesh.fsdp`` says how the devices share parameters.
      size: of the networks, whose weights are never made.
      devices: all of a slice.
      progress: called with a line before each program.
    """
    fsdp, kind = ready.config.mesh.fsdp, devices[0].device_kind
    mesh = sharding.mesh_of(devices, fsdp)
    with compiling_for(devices[0].platform):
        programs, resident = capacity.programs(ready, size, mesh)
        for name in ("update", "rollout"):
            progress(f"{name} by the compiler for {len(devices)} x {kind} ...")
            start = time.perf_counter()
            taken, text = capacity.compiled(*programs[name], devices[0].platform)
            seconds = time.perf_counter() - start
            yield Program(name, resident, resident + taken, collectives(text), seconds)


def rows(entries: Iterable[Program]) -> list[tuple[str, float, str]]:
    """The same as ``table`` as a list of numbers."""
    found: list[tuple[str, float, str]] = []
    for entry in entries:
        found += [(f"{entry.name}: resident", entry.resident / 2**30, "GiB")]
        found += [(f"{entry.name}: most", entry.total / 2**30, "GiB")]
        found += [(f"{entry.name}: {kind}", size / 2**30, "GiB") for kind, (_, size) in entry.collectives.items()]
        found += [(f"{entry.name}: compiled in", entry.seconds, "s")]
    return found


def table(entries: Iterable[Program], chips: int, fsdp: int) -> str:
    """What one chip holds and what goes between the chips, in Markdown."""
    lines = [
        "| GiB on one chip | resident | most | " + " | ".join(KINDS) + " | compiled in |",
        "|---|---:|---:|" + "---:|" * len(KINDS) + "---:|",
    ]
    for entry in entries:
        cells = [f"{entry.resident / 2**30:.1f}", f"{entry.total / 2**30:.1f}"]
        cells += [f"{size / 2**30:.2f} in {count}" if count else "0" for count, size in entry.collectives.values()]
        name = f"{entry.name}, {chips} chips, fsdp {fsdp}"
        lines.append("| " + " | ".join([name, *cells, f"{entry.seconds:.0f} s"]) + " |")
    notes = (
        "Bytes of a collective are those of the whole array; a program whose bytes do not fit is refused by the "
        "compiler, and its collectives are not known then."
    )
    return "\n".join([*lines, "", notes])


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """``{kind: (how many, bytes)}`` of the collectives in a compiled program's text; kinds that do not occur are 0."""
    found = {kind: (0, 0) for kind in KINDS}
    for result, kind, start, rest in _INSTRUCTION.findall(text):
        arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind != "all-reduce":  # (what it takes, what it makes, perhaps counters)
            arrays = [array for array in arrays if array > 8]
            arrays = arrays[len(arrays) // 2 :]
        size = sum(arrays)
        if kind == "reduce-scatter":
            size *= _group(rest)
        count, total = found[kind]
        found[kind] = count + 1, total + size
    return found


def _bytes(kind: str, dimensions: str) -> int:
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def _group(attributes: str) -> int:
    """How many devices take part in one group of a collective: ``{{0,1},{2,3}}`` or ``[2,2]<=[4]``."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    return int(counted[1]) if counted else 1
