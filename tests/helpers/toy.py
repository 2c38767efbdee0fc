"""A policy of a few thousand parameters whose every formula fits on this page, for tests of sampler and learner.

The network is a 3x3 convolution, a tanh layer with time and prompt added, and a mixing layer large enough to be split
over an ``fsdp`` axis. It follows the dtype of its inputs, so that an oracle can run it in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.diffusion import ddim
from ddpo_jax.diffusion.policy import Policy

SHAPE = (4, 4, 4)
HIDDEN, LENGTH, FEATURES = 128, 3, 6
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    """Trained parameters by name."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 4, HIDDEN), "prompt": (FEATURES, HIDDEN), "mix": (HIDDEN, HIDDEN), "out": (HIDDEN, 4)}
    out = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in out.items()}


FROZEN = {"bias": np.linspace(-0.1, 0.1, 4, dtype=np.float32)}


def network(params, frozen, latents, timesteps, context):
    """[B, h, w, 4], of every input and parameter."""
    h = jax.lax.conv_general_dilated(
        latents, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = h + (context.mean(axis=1) @ params["prompt"])[:, None, None] + (timesteps / 1000.0)[:, None, None, None]
    h = jnp.tanh(jnp.tanh(h) @ params["mix"])
    return h @ params["out"] + frozen["bias"]


def bound(params, *inputs):
    """The network with its frozen parameters."""
    return network(params, FROZEN, *inputs)


def policy(num_steps: int, *, eta: float = 1.0, guidance_scale: float = 3.0, **options) -> Policy:
    """Of ``num_steps`` steps; ``options`` change the scheduler's config."""
    return Policy(ddim.make(STABLE_DIFFUSION | options, num_steps, eta), network, guidance_scale)


def contexts(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Prompt embeddings [n, L, D] and the empty prompt's [L, D]."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((n, LENGTH, FEATURES), (LENGTH, FEATURES)))
