"""Noise schedules of Stable Diffusion, read from a folder's ``scheduler/scheduler_config.json``.

Notation follows DDIM (Song et al. 2021, arXiv:2010.02502): alphas_cumprod is the paper's alpha_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Num

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema

_FILE = "scheduler_config.json"


@struct.dataclass
class Schedule:
    """The T denoising steps of any noise process; index 0 is the noisiest."""

    timesteps: Num[Array, " T"]  # the network's time input
    std: Float[Array, " T"]  # standard deviation of each step's Gaussian
    trainable: Bool[np.ndarray, " T"] = struct.field(pytree_node=False)  # False where std = 0: no density exists there

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.trainable)


@struct.dataclass
class NoiseLevels(Schedule):
    """The steps of a process that mixes signal and noise so that their squared factors add up to 1."""

    alpha: Float[Array, " T"]  # alphas_cumprod at the step's timestep
    alpha_prev: Float[Array, " T"]  # and at the timestep it leads to
    # Rounded once: near alpha = 1 the float32 difference 1 - alpha is off by up to 4e-5 of itself.
    sigma: Float[Array, " T"]  # sqrt(1 - alpha)
    direction: Float[Array, " T"]  # sqrt(1 - alpha_prev - std^2): factor of the noise prediction in the mean
    alphas_cumprod: Float[Array, " train"]  # of all training timesteps
    prediction_type: str = struct.field(pytree_node=False)

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the network was trained on; they count from 0."""
        return len(self.alphas_cumprod)


def make(config: Mapping[str, Any], num_steps: int, eta: float) -> NoiseLevels:
    """Builds the schedule of ``num_steps`` DDIM steps.

    Args:
      config: the diffusers scheduler config, of a class that ``transition.make`` accepts.
      num_steps: number of denoising steps T.
      eta: 0 is the deterministic DDIM, 1 the DDPM posterior (``variance_type = fixed_small``).

    Raises:
      InputError: for an option of the config that is not supported, or ``num_steps`` out of range.
    """
    kind = config["_class_name"] if "_class_name" in config else None  # they differ in what an absent key means
    options: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": kind != "PNDMScheduler",
        "trained_betas": None,
        "clip_sample": kind in ("DDIMScheduler", "DDPMScheduler"),
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    } | dict(config)
    schema.check(_FILE, options, schema.SCHEDULER, "use a folder that has it")
    train_steps = options["num_train_timesteps"]
    if not 1 <= num_steps <= train_steps:
        raise InputError(
            f"sample.num_steps: received {num_steps}; must be in 1..{train_steps}; choose a smaller number"
        )

    alphas_cumprod = np.cumprod(1.0 - _betas(options))
    if alphas_cumprod[-1] < np.finfo(np.float32).tiny:
        raise InputError(
            f"{_FILE} beta_end: received {schema.shown(options['beta_end'])}; after {train_steps} timesteps of these "
            "betas nothing is left of an image; use a folder with smaller ones"
        )
    timesteps = _timesteps(num_steps, train_steps, options["timestep_spacing"], options["steps_offset"])
    prev = timesteps - train_steps // num_steps
    final = 1.0 if options["set_alpha_to_one"] else alphas_cumprod[0]
    alpha, alpha_prev = alphas_cumprod[timesteps], np.where(prev >= 0, alphas_cumprod[np.maximum(prev, 0)], final)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    std = eta * np.sqrt(variance)
    return NoiseLevels(
        timesteps=jnp.asarray(timesteps, jnp.int32),
        alpha=jnp.asarray(alpha, jnp.float32),
        alpha_prev=jnp.asarray(alpha_prev, jnp.float32),
        std=jnp.asarray(std, jnp.float32),  # eta * sqrt(variance of the posterior)
        sigma=jnp.asarray(np.sqrt(1 - alpha), jnp.float32),
        # max: with set_alpha_to_one the last direction is exactly 0, and rounding must not make it imaginary
        direction=jnp.asarray(np.sqrt(np.maximum(1 - alpha_prev - std**2, 0.0)), jnp.float32),
        alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
        trainable=std > 0,
        prediction_type=options["prediction_type"],
    )


def _betas(options: Mapping[str, Any]) -> np.ndarray:
    start, end, n = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    betas = options["trained_betas"]
    if betas is not None:
        if len(betas) != n:
            rule = f"there must be one for each of num_train_timesteps={n}"
            raise InputError(f"{_FILE} trained_betas: received {len(betas)} numbers; {rule}; use a folder that has it")
        return np.asarray(betas, np.float64)
    if options["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, n) ** 2
    if options["beta_schedule"] == "linear":
        return np.linspace(start, end, n)
    # squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17), capped at 0.999
    alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _timesteps(num_steps: int, train_steps: int, spacing: str, offset: int) -> np.ndarray:
    if spacing == "leading":
        steps: np.ndarray = np.arange(num_steps)[::-1] * (train_steps // num_steps) + offset
    elif spacing == "trailing":
        # the slice: for 62 values of num_steps, rounding gives arange one step too many, timestep -1
        steps = np.round(np.arange(train_steps, 0, -train_steps / num_steps)[:num_steps]) - 1
    else:
        steps = np.round(np.linspace(0, train_steps - 1, num_steps))[::-1]
    steps = steps.astype(np.int64)
    if steps.max() >= train_steps:
        raise InputError(
            f"sample.num_steps: received {num_steps}; with steps_offset {offset} the first timestep would be "
            f"{steps.max()}, beyond the {train_steps} trained ones; choose a smaller number"
        )
    return steps
