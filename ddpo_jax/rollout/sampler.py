"""The image sampler: noise process, network, guidance, the noise of every sample, the scan and the decoding as one.

Training, evaluation, measurements and the command ``sample`` all draw their images here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from ddpo_jax import sharding
from ddpo_jax.diffusion import sampler
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.hosts import rows as hosts
from ddpo_jax.ops import random
from ddpo_jax.types import AnyArray, Params, Trajectory

Weighting = Callable[[Array, Any], Array]  # (latents [N,T+1,h,w,c], noise process) -> [N,T]


class Codec(Protocol):
    """What surrounds the denoising network: text in, pixels out. A ``models.pipeline.Pipeline`` is one."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""

    def embed(self, prompts: Sequence[str]) -> Float[np.ndarray, "N L D"]:
        """Text embeddings, on the host."""

    def decode(self, latents: Float[Array, "N h w c"]) -> UInt8[Array, "N H W 3"]:
        """Images, on the device of the latents."""


class ImageSampler:
    """Draws trajectories and images of prompts, split over the devices of a mesh.

    The noise of a sample follows from a key and the sample's number (its id) alone, so neither the batch that the
    sample is in nor the devices change it. N must be a multiple of the number of devices; ``images`` takes any N.
    """

    def __init__(
        self,
        policy: Policy,
        frozen: Params,
        uncond: Float[Array, "L D"],
        codec: Codec,
        mesh: Mesh,
        weighting: Weighting | None = None,
        rules: tuple[sharding.Rule, ...] = sharding.DEFAULT_RULES,
    ):
        """Args:
        policy: noise process, network and guidance.
        frozen: the network's parameters that training leaves alone, on the mesh.
        uncond: embedding of the empty prompt, on the mesh.
        codec: text encoder and decoder.
        mesh: of devices.
        weighting: timestep weights of a batch of trajectories, computed beside them; None is 1 for every step.
        rules: by which parameters are split over the mesh.
        """
        self.policy, self.frozen, self.uncond, self.codec, self.mesh = policy, frozen, uncond, codec, mesh
        self.rules, self._weighting = rules, weighting or _equal
        batch, whole = sharding.BATCH, P()
        trajectories = (whole, batch, whole, batch, batch, whole)
        self.program = self._compiled(self._trajectories, trajectories)  # with all arguments, for who wants its trace
        self._continuations = self._compiled(self._resume, (whole, batch, whole, batch, batch, whole))
        self._predictions = self._compiled(self._predict, (whole, batch, batch, whole))

    def trajectories(
        self,
        params: Params,
        prompts: Sequence[str],
        ids: Int[np.ndarray, " N"],
        key: Array,
        root_ids: Int[np.ndarray, " N"] | None = None,
        branch_step: int = 0,
    ) -> tuple[Trajectory, Float[Array, "N T"]]:
        """N trajectories and their timestep weights (up to a factor for each trajectory), on the devices.

        Args:
          params: the trained parameters of the policy that samples, on the mesh.
          prompts: N texts; of them and the ids each process takes its own, as ``hosts.rows.own`` says.
          ids: the samples' numbers.
          key: of all noise.
          root_ids: samples with equal root ids (and prompts) share the initial noise and the steps before
            ``branch_step``; None is ``ids``.
          branch_step: see ``root_ids``.
        """
        roots = ids if root_ids is None else root_ids
        context, *samples = self._put(prompts, ids.astype(np.int32), roots.astype(np.int32))
        return self.program(params, self.frozen, self.uncond, context, key, *samples, np.int32(branch_step))

    def images(
        self, params: Params, prompts: Sequence[str], ids: Int[np.ndarray, " N"], key: Array, batch_size: int
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """One image of each of N prompts, on the host of every process; arguments as of ``trajectories``.

        ``batch_size`` images are drawn at a time (rounded up to a multiple of the devices). The last batch is filled
        up with images that nobody sees, so that one program serves all.
        """
        size = math.ceil(batch_size / self.mesh.size) * self.mesh.size
        found = []
        for start in range(0, len(prompts), size):
            there = range(start, min(start + size, len(prompts)))
            rows = np.resize(there, size)
            trajectory, _ = self.trajectories(params, [prompts[int(row)] for row in rows], ids[rows], key)
            found.append(sharding.fetch(self.decode(trajectory.latents[:, -1]))[: len(there)])
        return np.concatenate(found)

    def continuations(
        self,
        params: Params,
        prompts: Sequence[str],
        ids: Int[np.ndarray, " N"],
        key: Array,
        latents: Float[AnyArray, "N h w c"],
        step: int,
    ) -> Float[Array, "N h w c"]:
        """The final latents to which N latents at step ``step`` lead; see ``trajectories`` for the others."""
        context, *samples = self._put(prompts, ids.astype(np.int32), latents)
        return self._continuations(params, self.frozen, self.uncond, context, key, *samples, np.int32(step))

    def predictions(
        self, params: Params, prompts: Sequence[str], latents: Float[AnyArray, "N h w c"], step: int
    ) -> Float[Array, "N h w c"]:
        """The clean latents that the network predicts from N latents at step ``step``; see ``trajectories``."""
        samples = self._put(prompts, latents)
        return self._predictions(params, self.frozen, self.uncond, *samples, np.int32(step))

    def decode(self, latents: Float[Array, "N h w c"]) -> UInt8[Array, "N H W 3"]:
        """Images of latents, on their device."""
        return self.codec.decode(latents)

    def _put(self, prompts: Sequence[str], *arrays: AnyArray) -> list[Array]:
        """The embeddings of N prompts and arrays of N samples on the devices."""
        rows = hosts.own(len(prompts))
        return sharding.put_batch([self.codec.embed(prompts[rows]), *(x[rows] for x in arrays)], self.mesh)

    def _compiled(self, function: Callable[..., Any], in_specs: tuple[P, ...]) -> Any:
        """``function(params, frozen, uncond, ...)`` with whole parameters and each device's own samples, compiled."""
        return jax.jit(sharding.per_device(function, self.mesh, 2, in_specs, sharding.BATCH, self.rules))

    def _trajectories(
        self,
        params: Params,
        frozen: Params,
        uncond: Array,
        context: Array,
        key: Array,
        ids: Array,
        root_ids: Array,
        branch_step: Array,
    ) -> tuple[Trajectory, Array]:
        keys, root_keys = random.sample_keys(key, ids), random.sample_keys(key, root_ids)
        shape = self.codec.latent_shape
        found = sampler.sample(self.policy, params, frozen, keys, context, uncond, shape, root_keys, branch_step)
        return found, self._weighting(found.latents, self.policy.transition)

    def _resume(
        self,
        params: Params,
        frozen: Params,
        uncond: Array,
        context: Array,
        key: Array,
        ids: Array,
        latents: Array,
        step: Array,
    ) -> Array:
        keys = random.sample_keys(key, ids)
        return sampler.resume(self.policy, params, frozen, keys, context, uncond, latents, step)

    def _predict(
        self, params: Params, frozen: Params, uncond: Array, context: Array, latents: Array, step: Array
    ) -> Array:
        steps = jnp.full(len(latents), step)
        return self.policy.predicted(params, frozen, latents, steps, context, uncond)


def _equal(latents: Float[Array, "N T1 h w c"], _: Any) -> Float[Array, "N T"]:
    """Every step counts the same."""
    return jnp.ones((latents.shape[0], latents.shape[1] - 1), jnp.float32)
