"""The noise process of a diffusion model, as all else sees it, and which of them a diffusers folder asks for.

Policy, sampler, learner and weightings read ``Transition`` and nothing else of a noise process, so another one (a
rectified flow, say) is a file with these members and a line in ``BY_SCHEDULER``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from ddpo_jax.diffusion import ddim
from ddpo_jax.errors import InputError


class Transition(Protocol):
    """T Gaussian steps from noise to clean latents; step 0 is the noisiest. The initial noise is standard normal."""

    @property
    def timesteps(self) -> Num[Array, " T"]:
        """The network's time input at each step."""

    @property
    def std(self) -> Float[Array, " T"]:
        """The standard deviation of each step's Gaussian."""

    @property
    def trainable(self) -> Bool[np.ndarray, " T"]:
        """Whether the step has a density, hence a log-probability: False where std is 0."""

    @property
    def num_steps(self) -> int:
        """T."""

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps, from 0, ``add_noise`` takes."""

    def step(
        self, model_output: Float[Array, "B h w c"], latents: Float[Array, "B h w c"], index: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, " B"]]:
        """The Gaussian over the next latents.

        Args:
          model_output: the (guided) network output at ``latents``.
          latents: at step ``index``.
          index: the step of each sample.

        Returns:
          mean [B, h, w, c] and standard deviation [B], both float32.
        """

    def predictions(
        self, model_output: Float[Array, "B h w c"], latents: Float[Array, "B h w c"], index: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """The clean latents and the noise that a network output stands for; arguments as of ``step``."""

    def add_noise(
        self, clean: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], timesteps: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """The forward process at training timesteps: ``(noised latents, the target of the network output)``."""


# The diffusers schedulers that share betas, timestep spacing and prediction types with DDIM. Which of them a folder
# names says how its author liked to sample; the trained network is the same, and is sampled here by DDIM steps.
DDIM_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
BY_SCHEDULER: dict[str, Callable[[Mapping[str, Any], int, float], Transition]] = dict.fromkeys(
    DDIM_SCHEDULERS, ddim.make
)


def make(config: Mapping[str, Any], num_steps: int, eta: float) -> Transition:
    """The noise process of a diffusers folder.

    Args:
      config: the content of ``scheduler/scheduler_config.json``; without ``_class_name`` it is DDIM's.
      num_steps: number of denoising steps T.
      eta: share of the noise of each step, 0 (none) to 1.

    Raises:
      InputError: the class of the scheduler or an option of it is not supported, or ``num_steps`` is out of range.
    """
    name = config["_class_name"] if "_class_name" in config else "DDIMScheduler"
    if name not in list(BY_SCHEDULER):  # a list, for what has no hash
        raise InputError(
            f"scheduler_config.json _class_name: received {name!r}; it must be one of {', '.join(BY_SCHEDULER)}; "
            "use a folder that has one of them"
        )
    return BY_SCHEDULER[name](config, num_steps, eta)
