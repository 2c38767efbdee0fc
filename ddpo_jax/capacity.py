"""What the work needs and what the chip gives: floating point operations, bytes, peaks.

Operations are those of the mathematics (a matrix product of [a, b] and [b, c] counts 2abc), as XLA counts them in the
program before it optimises: what rematerialisation computes twice counts once. Bytes are what the compiler reserves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.build import build
from ddpo_jax.learner import Minibatch
from ddpo_jax.models.attention import compiling_for
from ddpo_jax.models.pipeline import decode_slice
from ddpo_jax.random_model import Size, random_model

# Dense bfloat16 operations per second and chip, from the makers' data sheets; the longest name that fits counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,  # float16
    "V100": 125e12,  # float16
    "TPU v3": 61.5e12,  # of one core, which is a device of JAX
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
CHIPS = {"H100": 80, "A100": 40, "TPU v4": 32, "TPU v5e": 16}  # GiB of memory on each, for the table of what fits
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2"}  # chips whose compiler, libtpu, needs none of them
REMAT = ("on", "off")
USABLE = 0.92  # of a chip's memory: the runtime keeps some, and allocation wastes some


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of a device as JAX names it, or None where the table does not know it."""
    names = [name for name in PEAKS if name.lower() in device_kind.lower()]
    return PEAKS[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one sample.

    Attributes:
      rollout_step: a denoising step, both branches of guidance.
      update_step: gradient of a step's log-probability by the trained parameters, both branches.
      decode: latents to an image.
    """

    rollout_step: float
    update_step: float
    decode: float


def work(config: ConfigDict, size: Size) -> Work:
    """The operations of a model, counted on shapes: nothing is computed.

    Args:
      config: resolved; what is trained, and whether with guidance.
      size: of the networks.
    """
    plain = config.copy_and_resolve_references()
    plain.attention, plain.train.remat = "xla", "off"  # loops and kernels hide operations, the latter doubles them
    model = random_model(plain, size, shapes_only=True)
    pipe, batch = model.pipeline, 1 if config.sample.guidance_scale == 1 else 2
    inputs = _float(batch, *pipe.latent_shape), _int(batch), _float(batch, size.tokens, size.unet.cross_attention_dim)

    def loss(params: Any, *rest: Any) -> jax.Array:
        return model.network(params, *rest).sum()

    graphdef, state = nnx.split(pipe.vae)
    return Work(
        rollout_step=_count(model.network, model.params, model.frozen, *inputs),
        update_step=_count(jax.value_and_grad(loss), model.params, model.frozen, *inputs),
        decode=_count(lambda state, x: nnx.merge(graphdef, state).decode(x), state, _float(1, *pipe.latent_shape)),
    )


def _count(function: Callable[..., Any], *args: Any) -> float:
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(analysis["flops"])


def _float(*shape: int) -> Any:  # a jax.ShapeDtypeStruct, where an array is declared
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(*shape: int) -> Any:  # likewise
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; each number includes ``resident``.

    Attributes:
      setting: what is trained and how, in words.
      resident: parameters, optimizer and averages, reference, VAE and text encoder.
      rollout, decode, update: the most that is taken while it runs, by ``paper_bytes``.
      compiled_rollout, compiled_update: the same by a compiler; None where none was asked.
      compiled_for: the key of ``CHIPS`` whose compiler that was, if any.
    """

    setting: str
    resident: int
    rollout: int
    decode: int
    update: int
    compiled_rollout: int | None = None
    compiled_update: int | None = None
    compiled_for: str = ""

    @property
    def fits(self) -> list[str]:
        """The chips whose memory is enough: by the compiler where that is the chip's own, on paper where not."""
        chips = []
        for chip, gib in CHIPS.items():
            most = [self.rollout, self.decode, self.update]
            if chip == self.compiled_for:
                most = [x for x in (self.compiled_rollout, self.decode, self.compiled_update) if x is not None]
            if max(most) <= USABLE * gib * 2**30:
                chips.append(chip)
        return chips


def memory(
    config: ConfigDict, size: Size, compile_for: str = "none", progress: Callable[[str], None] = lambda line: None
) -> Iterator[Memory]:
    """What training takes on one device with adapters and of the whole UNet, with and without rematerialisation.

    Works on shapes: nothing of the model's size is allocated.

    Args:
      config: resolved; its ``train.lora_rank`` (4 if it is 0) and all else but ``train.remat`` are kept.
      size: of the networks.
      compile_for: "none"; "here", the first device at hand; or a key of ``TOPOLOGIES``.
      progress: called with a line at the start of every stage.

    Raises:
      ValueError: there is no compiler for ``compile_for``.
    """
    device = None if compile_for == "none" else _device(compile_for)
    for rank, remat in itertools.product((config.train.lora_rank or 4, 0), REMAT):
        config = config.copy_and_resolve_references()
        config.train.lora_rank, config.train.remat = rank, remat
        setting = f"{f'adapters of rank {rank}' if rank else 'whole UNet'}, remat {remat}"
        progress(f"{setting}: on paper")
        with compiling_for("gpu"):  # not the CPU's convolutions, and no kernel that hides what it takes
            programs, resident = _programs(config, size, jax.devices()[0])
            paper: dict[str, Any] = {name: resident + paper_bytes(traced()) for name, traced in programs.items()}
        compiled: dict[str, Any] = {}
        if device is not None:
            with compiling_for(device.platform) if compile_for in TOPOLOGIES else contextlib.nullcontext():
                programs, _ = _programs(config, size, device)
                for name in ("rollout", "update"):
                    progress(f"{setting}: {name} by the compiler for {device.device_kind}")
                    compiled[f"compiled_{name}"] = resident + _compiled_bytes(programs[name](), device.platform)
            compiled["compiled_for"] = f"TPU {compile_for}"
        yield Memory(setting, resident, **paper, **compiled)


def _device(compile_for: str) -> Any:
    if compile_for == "here":
        return jax.devices()[0]
    from jax.experimental import topologies

    # Keeps libtpu from asking a metadata server, which only a TPU's machine has, what it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[compile_for]).devices[0]
    except Exception as error:  # of many kinds, by what is missing
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"--compile-for: received {compile_for!r}; its compiler does not start ({first}); it is in the package "
            "libtpu; install the extra tpu, or use none"
        ) from error


def _programs(config: ConfigDict, size: Size, device: Any) -> tuple[dict[str, Callable[[], Any]], int]:
    """``({name: traces the program}, resident bytes)`` of a run on ``device``."""
    mesh = Mesh(np.array([[device]]), sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    parts = build(config, random_model(config, size, shapes_only=True), mesh)
    model = parts.model
    state = jax.eval_shape(parts.learner.init, model.params)
    graphdef, vae = nnx.split(model.pipeline.vae)
    resident = _bytes((state, model.frozen, model.reference, vae)) + 4 * size.text_params
    context, n = (size.tokens, size.unet.cross_attention_dim), config.sample.batch_size
    sampled = _float(n, *context), _int(), _int(n), _int(n), _int()
    batch = minibatch_shapes(config, model.pipeline.latent_shape, context)
    slice_size = decode_slice(model.pipeline.latent_shape, size.vae.factor)

    def decode(vae: Any, latents: Any) -> Any:
        return nnx.merge(graphdef, vae).decode(latents, slice_size=slice_size)

    return {
        "rollout": lambda: parts.collector.sample.trace(state.params, model.frozen, parts.uncond, *sampled),
        "decode": lambda: jax.jit(decode).trace(vae, _float(n, *model.pipeline.latent_shape)),
        "update": lambda: parts.learner.update.trace(state, model.reference, model.frozen, parts.uncond, batch),
    }, resident


def _compiled_bytes(traced: Any, platform: str) -> int:
    """Bytes that a compiled program takes besides its arguments; also where the compiler refuses it as too large."""
    # XLA:CPU spends its time on machine code, which need not be good where it will not run.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else {}
    try:
        analysis = traced.lower().compile(options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm", str(error))
        if found is None:
            raise
        arguments = _bytes(traced.jaxpr.in_avals)
        return int(float(found[1]) * {"M": 2**20, "G": 2**30}[found[2]]) - arguments
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def minibatch_shapes(config: ConfigDict, latent_shape: tuple[int, int, int], context: tuple[int, int]) -> Minibatch:
    """The shapes of one update's samples, all steps trained."""
    n, steps = config.train.batch_size, config.sample.num_steps
    return Minibatch(
        latents=_float(n, steps + 1, *latent_shape),
        context=_float(n, *context),
        old_log_prob=_float(n, steps),
        advantages=_float(n),
        rewards=_float(n),
        prompt_ids=_int(n),
        steps=_int(n, steps),
        step_weight=_float(n, steps),
        mask=_float(n, steps),
        seeds=_int(n),
        values=None,
    )


def _bytes(tree: Any) -> int:  # of arrays, or of what has a shape and a type
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- memory on paper --------------------------------------------------------------------------------------------------

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
