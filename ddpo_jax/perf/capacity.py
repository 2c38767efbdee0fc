"""What the work needs and what the chip gives: floating point operations, bytes, peaks.

Operations are those of the mathematics (a matrix product of [a, b] and [b, c] counts 2abc), as XLA counts them in the
program before it optimises: what rematerialisation computes twice counts once. Bytes are what the compiler reserves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.config.ready import Ready
from ddpo_jax.errors import InputError
from ddpo_jax.models.attention import compiling_for
from ddpo_jax.models.pipeline import decode_slice
from ddpo_jax.perf.liveness import paper_bytes
from ddpo_jax.perf.random_model import Size, random_model
from ddpo_jax.training.build import build
from ddpo_jax.training.learner import Minibatch, ValuedMinibatch

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
SLICES = {"v5e-8": "v5e:2x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16"}  # many chips, for ``perf.topology``
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
    plain = ConfigDict(config)
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
    ready: Ready, size: Size, compile_for: str = "none", progress: Callable[[str], None] = lambda line: None
) -> Iterator[Memory]:
    """What training takes on one device with adapters and of the whole UNet, with and without rematerialisation.

    Works on shapes: nothing of the model's size is allocated.

    Args:
      ready: its ``train.lora_rank`` (4 if it is 0) and all else but ``train.remat`` are kept.
      size: of the networks.
      compile_for: "none"; "here", the first device at hand; or a key of ``TOPOLOGIES``.
      progress: called with a line at the start of every stage.

    Raises:
      InputError: there is no compiler for ``compile_for``.
    """
    device = None if compile_for == "none" else devices_of(compile_for)[0]
    for rank in (ready.config.train.lora_rank or 4, 0):
        by_compiler: dict[str, Any] = {}
        for remat in REMAT:
            varied = ready.with_values({"train.lora_rank": rank, "train.remat": remat})
            setting = f"{f'adapters of rank {rank}' if rank else 'whole UNet'}, remat {remat}"
            progress(f"{setting}: on paper")
            with compiling_for("gpu"):  # not the CPU's convolutions, and no kernel that hides what it takes
                found, resident = programs(varied, size, sharding.mesh_of(jax.devices()[:1], 1))
                paper: dict[str, Any] = {
                    name: resident + paper_bytes(program.trace(*args)) for name, (program, args) in found.items()
                }
            if device is not None:
                names = ("update",) if by_compiler else ("rollout", "update")  # remat concerns the update alone
                with compiling_for(device.platform) if compile_for in TOPOLOGIES else contextlib.nullcontext():
                    found, _ = programs(varied, size, sharding.mesh_of([device], 1))
                    for name in names:
                        progress(f"{setting}: {name} by the compiler for {device.device_kind} ...")
                        start = time.perf_counter()
                        total = resident + compiled(*found[name], device.platform)[0]
                        progress(f"  {total / 2**30:.2f} GiB, in {time.perf_counter() - start:.0f} s")
                        by_compiler[f"compiled_{name}"] = total
                by_compiler["compiled_for"] = f"TPU {compile_for}"
            yield Memory(setting, resident, **paper, **by_compiler)


def devices_of(compile_for: str) -> list[Any]:
    """The devices of ``compile_for``: those "here", or those of a topology, which need not be there.

    Raises:
      InputError: there is no compiler for them.
    """
    if compile_for == "here":
        return jax.devices()
    from jax.experimental import topologies

    # Keeps libtpu from asking a metadata server, which only a TPU's machine has, what it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=(TOPOLOGIES | SLICES)[compile_for]).devices
    except Exception as error:  # of many kinds, by what is missing
        first = str(error).partition("\n")[0]
        raise InputError(
            f"--compile-for: received {compile_for!r}; its compiler does not start ({first}); it is in the package "
            "libtpu; install the extra tpu, or use none"
        ) from error


def programs(ready: Ready, size: Size, mesh: Mesh) -> tuple[dict[str, tuple[Any, tuple[Any, ...]]], int]:
    """``({name: (program, shapes of its arguments)}, bytes on one device that are resident)`` of a run on ``mesh``."""
    config = ready.config
    parts = build(ready, random_model(config, size, shapes_only=True), mesh)
    model = parts.model
    shapes = jax.eval_shape(parts.learner.init, model.params)
    state = sharding.put_params(shapes, mesh, parts.sampler.rules)
    state = dataclasses.replace(state, value=sharding.replicate(shapes.value, mesh))
    graphdef, vae = nnx.split(model.pipeline.vae)
    resident = _bytes((state, model.frozen, model.reference, vae)) + 4 * size.text_params
    context, n = (size.tokens, size.unet.cross_attention_dim), config.sample.batch_size
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampled = _float(n, *context), key, _int(n), _int(n), _int()
    minibatch = minibatch_shapes(config, model.pipeline.latent_shape, context)
    if parts.value is not None:
        minibatch = ValuedMinibatch(**vars(minibatch), values=_float(*minibatch.steps.shape))
    batch = jax.tree.map(lambda x: _split(x, mesh), minibatch)
    slice_size = decode_slice(model.pipeline.latent_shape, size.vae.factor)

    def decode(vae: Any, latents: Any) -> Any:
        return nnx.merge(graphdef, vae).decode(latents, slice_size=slice_size)

    return {
        "rollout": (parts.sampler.program, (state.params, model.frozen, parts.uncond, *sampled)),
        "decode": (jax.jit(decode), (vae, _float(n, *model.pipeline.latent_shape))),
        "update": (parts.learner.update, (state, model.reference, model.frozen, parts.uncond, batch)),
    }, resident


def compiled(program: Any, args: tuple[Any, ...], platform: str) -> tuple[int, str]:
    """``(bytes on one device besides the arguments, text)`` of a compiled program.

    Where the compiler refuses it as too large there is no text.
    """
    # The time of compilers goes into fast code, which this need not be: it will not run.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else {}
    effort = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, effort)
    jax.config.update(effort, -1.0)
    try:
        found = program.lower(*args).compile(options)
        analysis = found.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        return needed - _bytes(args), ""
    finally:
        jax.config.update(effort, before)
    taken = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return taken, found.as_text()


def refused_bytes(message: str) -> int | None:
    """What a program would take, arguments included, as libtpu puts it where that is more than the chip has."""
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([MG])(?: of |\) exceeds available HBM)", message)
    return int(float(found[1]) * {"M": 2**20, "G": 2**30}[found[2]]) if found else None


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
        penalty_weight=_float(n, steps),
        mask=_float(n, steps),
        seeds=_int(n),
    )


def _split(x: jax.ShapeDtypeStruct, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.BATCH))


def _bytes(tree: Any) -> int:  # on one device, of arrays or of what has a shape, a type and perhaps a place
    return sum(math.prod(_on_one(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _on_one(x: Any) -> tuple[int, ...]:
    placed = getattr(x, "sharding", None)
    return placed.shard_shape(x.shape) if isinstance(placed, NamedSharding) else x.shape
