"""Rollouts: prompts -> trajectories on devices -> images -> rewards on host threads -> scored samples on the host."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from ddpo_jax import sharding
from ddpo_jax.diffusion import sampler
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.ops import steps
from ddpo_jax.rollout.scoring import PendingReward, RewardRunner
from ddpo_jax.types import Params, Samples, Trajectory

Weighting = Callable[[Array, Any], Array]  # (latents [N,T+1,h,w,c], schedule) -> [N,T]
PromptFn = Callable[[np.random.Generator, int], tuple[list[str], list[dict[str, Any]]]]
_PROMPTS, _FIXED_PROMPTS = 0, 2  # streams of the host generator, see ``generator``
_FIXED_EPOCH = np.int32(2**31 - 1)  # whose noise no epoch of training takes


def generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """The host's random numbers of one epoch and purpose; nothing carries over, so resuming needs only the epoch."""
    return np.random.default_rng([seed, epoch, stream])


def prompt_id(prompt: str) -> int:
    """A 63-bit name of the prompt that is the same in every run."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


@dataclasses.dataclass
class Rollout:
    """One epoch's samples and what is shown of them."""

    samples: Samples
    prompts: list[str]
    images: UInt8[np.ndarray, "N H W 3"]
    parts: dict[str, Float[np.ndarray, " N"]]  # of the reward; NaN where a part does not apply
    rollout_s: float  # wall time until the last image was on the host
    reward_s: float  # wall time waited for rewards after that


class Collector:
    """Samples epochs. The device draws the next batch while host threads score the last one."""

    def __init__(
        self,
        policy: Policy,
        network: Callable[..., Array],
        mesh: Mesh,
        latent_shape: tuple[int, int, int],
        weighting: Weighting,
        embed: Callable[[list[str]], np.ndarray],
        decode: Callable[[Array], Array],
        prompt_fn: PromptFn,
        reward: RewardRunner,
        *,
        seed: int,
        batch_size: int,
        num_batches: int,
        samples_per_prompt: int,
        shared_noise: bool = False,
    ):
        """Args:
        policy, network, mesh: as the learner's.
        latent_shape: (h, w, c).
        weighting: timestep weights of a batch of trajectories.
        embed: prompts -> embeddings [N, L, D].
        decode: latents -> uint8 images.
        prompt_fn: (generator, count) -> prompts and their metadata.
        reward: runs the reward function.
        seed: of everything drawn.
        batch_size, num_batches: samples per device program, programs per epoch.
        samples_per_prompt: K; consecutive samples share a prompt.
        shared_noise: and their initial noise too.
        """
        self._policy, self._mesh, self._latent_shape = policy, mesh, latent_shape
        self._embed, self._decode, self._prompt_fn, self._reward = embed, decode, prompt_fn, reward
        self._seed, self._batch_size, self._num_batches, self._k = seed, batch_size, num_batches, samples_per_prompt
        self._shared_noise = shared_noise
        self.trained_steps = np.asarray(policy.schedule.trainable)

        def local(
            params: Params,
            frozen: Params,
            uncond: Array,
            context: Array,
            epoch: Array,
            ids: Array,
            roots: Array,
            branch: Array,
        ) -> tuple[Trajectory, Array]:
            bound = policy.bind(network, frozen)
            base = jax.random.fold_in(jax.random.key(seed), epoch)
            keys, root_keys = [jax.vmap(lambda i: jax.random.fold_in(base, i))(x) for x in (ids, roots)]
            trajectory = sampler.sample(bound, params, keys, context, uncond, latent_shape, root_keys, branch)
            return trajectory, weighting(trajectory.latents, policy.schedule)

        batch, whole = sharding.BATCH, P()
        data = (whole, batch, whole, batch, batch, whole)
        self.sample = jax.jit(sharding.per_device(local, mesh, 2, data, batch))

    def collect(
        self, epoch: int, params: Params, frozen: Params, uncond: Float[Array, "L D"], branch_step: int = 0
    ) -> Rollout:
        """One epoch of N = batch_size * num_batches samples.

        Args:
          epoch: number of the epoch, from which all randomness follows.
          params, frozen, uncond: of the policy that samples.
          branch_step: the samples of a prompt share the steps before this one; their mask leaves those out.

        Raises:
          RewardError: the reward failed; nothing of the run's state has changed.
        """
        start = time.perf_counter()
        rng = generator(self._seed, epoch, _PROMPTS)
        pending: list[tuple[PendingReward, Trajectory, Array, Array]] = []
        distinct, described = self._prompt_fn(rng, self._num_batches * self._batch_size // self._k)
        prompts = [prompt for prompt in distinct for _ in range(self._k)]
        metadata = [entry for entry in described for _ in range(self._k)]
        for batch in range(self._num_batches):
            rows = slice(batch * self._batch_size, (batch + 1) * self._batch_size)
            names = prompts[rows]
            ids = np.arange(self._batch_size, dtype=np.int32) + batch * self._batch_size
            roots = ids // self._k * self._k if branch_step or self._shared_noise else ids
            context, on_device, root_ids = sharding.put_batch((self._embed(names), ids, roots), self._mesh)
            trajectory, weights = self.sample(
                params, frozen, uncond, context, np.int32(epoch), on_device, root_ids, np.int32(branch_step)
            )
            images = self._decode(trajectory.latents[:, -1])
            pending.append((self._reward.submit(images, names, metadata[rows]), trajectory, weights, images))
        shown = np.concatenate([np.asarray(entry[3]) for entry in pending])
        sampled = time.perf_counter()
        scores = [entry[0].result() for entry in pending]
        scored = time.perf_counter()
        trajectories, weights = jax.device_get(([entry[1] for entry in pending], [entry[2] for entry in pending]))
        n = len(prompts)
        trained = self.trained_steps & (np.arange(len(self.trained_steps)) >= branch_step)
        samples = Samples(
            latents=np.concatenate([t.latents for t in trajectories]),
            log_prob=np.concatenate([t.log_prob for t in trajectories]),
            weights=steps.normalise(np.concatenate(weights), trained),
            mask=np.tile(trained.astype(np.float32), (n, 1)),
            context=self._embed(prompts),
            prompt_ids=np.asarray([prompt_id(p) for p in prompts], np.int64),
            group_ids=(np.int64(epoch) << 32) + np.arange(n) // self._k,
            rewards=np.concatenate([score for score, _ in scores]).astype(np.float32),
            advantages=np.zeros(n, np.float32),
        )
        part_names = dict.fromkeys(name for _, parts in scores for name in parts)
        nothing = np.full(self._batch_size, np.nan, np.float32)
        parts = {name: np.concatenate([p.get(name, nothing) for _, p in scores]) for name in part_names}
        return Rollout(samples, prompts, shown, parts, sampled - start, scored - sampled)

    def fixed(
        self, params: Params, frozen: Params, uncond: Float[Array, "L D"], count: int
    ) -> tuple[UInt8[np.ndarray, "N H W 3"], list[str]]:
        """Images of the same prompts from the same noise whenever it is called, and the prompts. No reward is asked.

        Costs one batch, by the program that ``collect`` has compiled or will need.

        Args:
          params, frozen, uncond: of the policy that samples.
          count: of images, each of its own prompt; at most those of one batch.
        """
        count, size = min(count, self._batch_size), self._batch_size
        prompts, _ = self._prompt_fn(generator(self._seed, 0, _FIXED_PROMPTS), count)
        names = [prompts[row % count] for row in range(size)]  # the batch is filled up
        ids = np.arange(size, dtype=np.int32)
        context, on_device = sharding.put_batch((self._embed(names), ids), self._mesh)
        trajectory, _ = self.sample(params, frozen, uncond, context, _FIXED_EPOCH, on_device, on_device, np.int32(0))
        return np.asarray(self._decode(trajectory.latents[:, -1]))[:count], prompts
