"""What the work needs and what the chip gives: floating point operations, bytes, peaks.

Operations are those of the mathematics (a matrix product of [a, b] and [b, c] counts 2abc), as XLA counts them in the
program before it optimises: what rematerialisation computes twice counts once. Bytes are what the compiler reserves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ddpo_jax.build import build
from ddpo_jax.learner import Minibatch
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
REMAT = ("on", "off")
_USABLE = 0.92  # of a chip's memory: the runtime keeps some, and allocation wastes some


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
    """Bytes on one device.

    Attributes:
      setting: what is trained and how, in words.
      resident: parameters, optimizer and averages, reference, VAE and text encoder.
      rollout, update: the most that is taken while either runs, ``resident`` included.
    """

    setting: str
    resident: int
    rollout: int
    update: int

    @property
    def fits(self) -> list[str]:
        """The chips whose memory is enough."""
        return [chip for chip, gib in CHIPS.items() if max(self.rollout, self.update) <= _USABLE * gib * 2**30]


def memory(config: ConfigDict, size: Size) -> Iterator[Memory]:
    """What training takes with adapters and of the whole UNet, with and without rematerialisation.

    Compiles for the device at hand, on shapes: nothing of the model's size is allocated.

    Args:
      config: resolved; its ``train.lora_rank`` (4 if it is 0) and all else but ``train.remat`` are kept.
      size: of the networks.
    """
    for rank, remat in itertools.product((config.train.lora_rank or 4, 0), REMAT):
        config = config.copy_and_resolve_references()
        config.train.lora_rank, config.train.remat = rank, remat
        kind = f"adapters of rank {rank}" if rank else "whole UNet"
        yield _memory(config, size, f"{kind}, remat {remat}")


def _memory(config: ConfigDict, size: Size, setting: str) -> Memory:
    parts = build(config, random_model(config, size, shapes_only=True))
    model = parts.model
    state = jax.eval_shape(parts.learner.init, model.params)
    vae = nnx.state(model.pipeline.vae)
    resident = _bytes((state, model.frozen, model.reference, vae)) + 4 * size.text_params
    context = (size.tokens, size.unet.cross_attention_dim)
    n = config.sample.batch_size
    rollout = parts.collector.sample.lower(
        *(state.params, model.frozen, parts.uncond),
        *(_float(n, *context), _int(), _int(n), _int(n), _int()),
    ).compile()
    batch = minibatch_shapes(config, model.pipeline.latent_shape, context)
    update = parts.learner.update.lower(state, model.reference, model.frozen, parts.uncond, batch).compile()
    return Memory(setting, resident, resident + _beyond(rollout), resident + _beyond(update) + _bytes(batch))


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


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _beyond(compiled: Any) -> int:
    """Bytes that a program takes besides its arguments."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
