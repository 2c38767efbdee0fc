"""Memory of a program on paper: which arrays live at the same time, in the order in which it is written."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Results of these are computed where they are read, as compilers do; the second kind only for a single reader.
_CHEAP = frozenset(
    "abs add and broadcast_in_dim clamp convert_element_type copy copy_p eq expand_dims ge gt integer_pow iota le lt "
    "max min mul ne neg not or reshape select_n sign square squeeze stop_gradient sub add_any".split()
)
_COSTLY = frozenset(
    "cos cbrt div erf erf_inv exp exp2 expm1 floor log log1p logistic pow rem round rsqrt sin sqrt tanh".split()
)
_INLINED = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr shard_map".split()
)
_IN_PLACE = frozenset("scan while dynamic_update_slice scatter scatter-add".split())


def paper_bytes(traced: Any) -> int:
    """The most that a program takes besides its arguments, on any device: a walk through it in the order written.

    An array is held from the operation that makes it to the last that reads it. Elementwise operations are computed
    where they are read, or write over an operand that nothing reads later; so do donated arguments and what a loop
    carries. Everything has its own type and its bare size.

    Left out is what compilers and chips add: tiles that are padded, workspace of convolutions, casts of parameters
    moved out of a loop, fragmentation. Left out also what they save by another order of the operations.

    Args:
      traced: ``jax.jit(f).trace(shapes)``.
    """
    donated = [info.donated for info in jax.tree.leaves(traced.args_info)]
    jaxpr = traced.jaxpr.jaxpr
    return _peak(jaxpr, [var for var, given in zip(jaxpr.invars, donated, strict=True) if given])


class _Op(NamedTuple):
    equation: Any
    reads: list[int]
    makes: list[int]


def _peak(jaxpr: Any, reusable: Sequence[Any]) -> int:
    sizes: dict[int, int] = {}
    names = {var: _name(var, sizes) for var in (*jaxpr.invars, *jaxpr.constvars)}
    ops = list(_inlined(jaxpr, names, sizes))
    results = {names[var] for var in jaxpr.outvars if not isinstance(var, Literal)}
    readers: dict[int, list[str]] = collections.defaultdict(list)
    for op in ops:
        for array in op.reads:
            readers[array].append(op.equation.primitive.name)

    # ``held[x]``: the arrays in memory from which x is had, x itself unless it is computed where it is read.
    held = {names[var]: frozenset([names[var]]) for var in reusable}
    last: dict[int, int] = {}
    virtual = set()
    for number, op in enumerate(ops):
        needed = frozenset().union(*(held.get(array, frozenset()) for array in op.reads))
        last |= dict.fromkeys(needed, number)
        for array in op.makes:
            if array not in results and _is_fused(op.equation.primitive.name, readers[array]):
                virtual.add(array)
                held[array] = needed
            else:
                held[array] = frozenset([array])
                last[array] = number
    last |= dict.fromkeys(frozenset().union(*(held.get(array, frozenset()) for array in results)), len(ops))
    freed: dict[int, list[int]] = collections.defaultdict(list)
    for array, number in last.items():
        freed[number].append(array)

    live = most = 0
    for number, op in enumerate(ops):
        made = sum(sizes[array] for array in op.makes if array not in virtual)
        ended = sum(sizes[array] for array in freed[number])
        operands = sum(sizes[array] for array in freed[number] if array not in op.makes)
        name, inner = op.equation.primitive.name, _inner_peak(op.equation)
        over = name in _CHEAP | _COSTLY | _IN_PLACE
        most = max(most, live + (max(made - operands, 0) + inner if over else max(made, inner)))
        live += made - ended
    return max(most, live)


def _is_fused(name: str, readers: list[str]) -> bool:
    if name not in _CHEAP and (name not in _COSTLY or len(readers) > 1):
        return False
    return all(reader in _CHEAP or reader in _COSTLY or reader.startswith("reduce_") for reader in readers)


def _inlined(jaxpr: Any, names: dict[Any, int], sizes: dict[int, int]) -> Iterator[_Op]:
    """The operations of a program and of the functions it calls; ``names`` and ``sizes`` are filled in."""
    for equation in jaxpr.eqns:
        reads = [None if isinstance(var, Literal) else names[var] for var in equation.invars]
        if equation.primitive.name in _INLINED:
            body = _bodies(equation)[0]
            inner = {var: _name(var, sizes) if x is None else x for var, x in zip(body.invars, reads, strict=True)}
            inner |= {var: _name(var, sizes) for var in body.constvars}
            yield from _inlined(body, inner, sizes)
            for outer, var in zip(equation.outvars, body.outvars, strict=True):
                names[outer] = _name(outer, sizes) if isinstance(var, Literal) else inner[var]
        else:
            makes = [_name(var, sizes) for var in equation.outvars]
            names |= dict(zip(equation.outvars, makes, strict=True))
            yield _Op(equation, [x for x in reads if x is not None], makes)


def _name(var: Any, sizes: dict[int, int]) -> int:
    """A new number for an array; the same variable has several where its function is called several times."""
    name = len(sizes)
    sizes[name] = math.prod(var.aval.shape) * var.aval.dtype.itemsize
    return name


def _inner_peak(equation: Any) -> int:
    """Of a loop's body, of the largest branch, of a rematerialised function."""
    name, params = equation.primitive.name, equation.params
    if name == "pallas_call":  # a kernel: it works in the chip's own small memory
        return 0
    peaks = [0]
    for body in _bodies(equation):
        carried: list[Any] = []
        if name == "scan":
            carried = body.invars[params["num_consts"] :][: params["num_carry"]]
        elif name == "while":
            carried = body.invars[params["body_nconsts"] :] if body is params["body_jaxpr"].jaxpr else []
        peaks.append(_peak(body, carried))
    return max(peaks)


def _bodies(equation: Any) -> list[Any]:
    lists = [value if isinstance(value, list | tuple) else [value] for value in equation.params.values()]
    programs = [entry for entries in lists for entry in entries if isinstance(entry, ClosedJaxpr | Jaxpr)]
    return [entry.jaxpr if isinstance(entry, ClosedJaxpr) else entry for entry in programs]
