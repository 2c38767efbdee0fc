"""What the work needs and what the chip gives: floating point operations, bytes, peaks.

Operations are those of the mathematics (a matrix product of [a, b] and [b, c] counts 2abc), as XLA counts them in the
program before it optimises: what rematerialisation computes twice counts once. Bytes are what the compiler reserves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.build import Model
from ddpo_jax.diffusion import schedule
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.learner import Learner, Minibatch, Objective, make_optimizer
from ddpo_jax.rollout import Collector

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


def work(model: Model, guided: bool) -> Work:
    """The operations of a model, counted on shapes; nothing is computed.

    Args:
      model: arrays or shapes. Its UNet must not rematerialise, or that counts too.
      guided: classifier-free guidance is on.
    """
    pipe = model.pipeline
    context = pipe.embed([""]).shape[1:]
    batch = 2 if guided else 1
    inputs = [_shape(batch, *pipe.latent_shape), _shape(batch), _shape(batch, *context)]
    params, frozen = _shapes(model.params), _shapes(model.frozen)

    def loss(params: Any, frozen: Any, *inputs: jax.Array) -> jax.Array:
        return model.network(params, frozen, *inputs).sum()

    vae = pipe.vae
    return Work(
        rollout_step=_count(model.network, params, frozen, *inputs),
        update_step=_count(jax.grad(loss), params, frozen, *inputs),
        decode=_count(lambda latents: vae.decode(latents), _shape(1, *pipe.latent_shape)),
    )


def _count(function: Callable[..., Any], *args: Any) -> float:
    cost = jax.jit(function).lower(*args).cost_analysis()
    return float(cost["flops"])
