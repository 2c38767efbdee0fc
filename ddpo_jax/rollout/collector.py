"""Rollouts: prompts -> trajectories on devices -> images -> rewards on a host thread -> an epoch's samples."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ddpo_jax import sharding
from ddpo_jax.hosts import rows as hosts
from ddpo_jax.hosts.exchange import gather
from ddpo_jax.ops import random
from ddpo_jax.ops.random import Stream
from ddpo_jax.rollout import everywhere
from ddpo_jax.rollout.sampler import ImageSampler
from ddpo_jax.rollout.scoring import PendingReward, RewardRunner
from ddpo_jax.types import HostArray, Params, Trajectory

# Of a batch, on the devices of this process or on its host: trajectories, timestep weights, images; and the images that
# the reward is asked for here, which are the same but for a reward that process 0 asks for everyone.
Drawn = tuple[Trajectory, Array, Array, Array]
PromptFn = Callable[[np.random.Generator, int], tuple[list[str], list[dict[str, Any]]]]


def prompt_id(prompt: str) -> int:
    """A 63-bit name of the prompt that is the same in every run."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an epoch draws.

    Attributes:
      seed: of everything drawn.
      batch_size: samples of one device program.
      num_batches: programs of an epoch.
      samples_per_prompt: K; consecutive samples share a prompt.
      shared_noise: the samples of a prompt share their initial noise too.
    """

    seed: int
    batch_size: int
    num_batches: int
    samples_per_prompt: int
    shared_noise: bool = False


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One epoch's samples and their rewards, on the hosts."""

    latents: Float[HostArray, "N T1 h w c"]  # latents[:, 0] is the initial noise, latents[:, T] is decoded
    log_prob: Float[np.ndarray, "N T"]  # of latents[:, t + 1] given latents[:, t], under the policy that sampled it
    weights: Float[np.ndarray, "N T"]  # timestep weights, up to a factor for each trajectory
    branch_step: int  # the samples of a prompt share the steps before this one
    prompts: list[str]
    context: Float[HostArray, "N L D"]  # prompt embeddings
    prompt_ids: Int[np.ndarray, " N"]  # 63-bit hash of the prompt
    group_ids: Int[np.ndarray, " N"]  # equal for the K samples of one draw of a prompt
    images: UInt8[HostArray, "N H W 3"]
    rewards: Float[np.ndarray, " N"]
    parts: dict[str, Float[np.ndarray, " N"]]  # of the reward; NaN where a part does not apply
    rollout_s: float  # wall time until the last image was on the host
    reward_s: float  # wall time waited for rewards after that


def landed(batches: Iterator[Drawn]) -> Iterator[Drawn]:
    """Batches on the host, each fetched while the device computes the next: no more than two are on the device.

    A batch is waited for only when the one after it was started, so the device is never without work.

    Args:
      batches: starts a batch whenever it is asked for one.
    """
    flying: Drawn | None = None
    for started in batches:
        for array in jax.tree.leaves(started):
            array.copy_to_host_async()
        if flying is not None:
            yield jax.device_get(flying)
        flying = started
    if flying is not None:
        yield jax.device_get(flying)


class Collector:
    """Samples epochs. The device draws the next batch while host threads score the last one."""

    def __init__(self, sampler: ImageSampler, prompt_fn: PromptFn, reward: RewardRunner, plan: Plan):
        """Args:
        sampler: draws the trajectories.
        prompt_fn: (generator, count) -> prompts and their metadata.
        reward: runs the reward function.
        plan: how much is drawn.
        """
        self._sampler, self._prompt_fn, self._reward, self._plan = sampler, prompt_fn, reward, plan

    def collect(self, epoch: int, params: Params, branch_step: int = 0) -> Rollout:
        """One epoch of N = batch_size * num_batches samples.

        Args:
          epoch: number of the epoch, from which all randomness follows.
          params: the trained parameters of the policy that samples.
          branch_step: the samples of a prompt share the steps before this one.

        Raises:
          RewardError: the reward failed; nothing of the run's state has changed.
        """
        start = time.perf_counter()
        plan, k = self._plan, self._plan.samples_per_prompt
        n, key = plan.num_batches * plan.batch_size, random.epoch_key(plan.seed, epoch)
        distinct, described = self._prompt_fn(random.generator(plan.seed, epoch, Stream.PROMPTS), n // k)
        prompts = [prompt for prompt in distinct for _ in range(k)]
        metadata = [entry for entry in described for _ in range(k)]
        batches = hosts.batches(n, plan.batch_size)

        def draw(ids: Int[np.ndarray, " B"]) -> Drawn:
            """Starts a batch; nothing of it is there yet."""
            roots = ids // k * k if branch_step or plan.shared_noise else ids
            texts = [prompts[i] for i in ids]
            trajectory, weights = self._sampler.trajectories(params, texts, ids, key, roots, branch_step)
            decoded = self._sampler.decode(trajectory.latents[:, -1])
            return *sharding.own((trajectory, weights, decoded)), everywhere.asked(self._reward, decoded)

        drawn: list[tuple[Trajectory, Array, Array]] = []
        pending: list[PendingReward | None] = []
        for ids, (trajectory, factors, decoded, asked) in zip(batches, landed(map(draw, batches)), strict=True):
            texts, entries = [prompts[i] for i in ids], [metadata[i] for i in ids]
            pending.append(everywhere.submit(self._reward, asked, texts, entries))
            drawn.append((trajectory, factors, decoded))
        sampled = time.perf_counter()
        rewards, parts = everywhere.collected(pending, batches)
        scored = time.perf_counter()
        trajectories, weights, images = jax.tree.map(lambda *batches: np.concatenate(batches), *drawn)
        log_prob, weights = map(np.concatenate, zip(*gather((trajectories.log_prob, weights)), strict=True))
        return Rollout(
            latents=hosts.spread(trajectories.latents),
            log_prob=log_prob,
            weights=weights,
            branch_step=branch_step,
            prompts=prompts,
            context=hosts.spread(self._sampler.codec.embed(prompts[hosts.own(n)])),
            prompt_ids=np.asarray([prompt_id(prompt) for prompt in prompts], np.int64),
            group_ids=(np.int64(epoch) << 32) + np.arange(n) // k,
            images=hosts.spread(images),
            rewards=rewards,
            parts=parts,
            rollout_s=sampled - start,
            reward_s=scored - sampled,
        )

    def fixed(self, params: Params, count: int) -> tuple[UInt8[np.ndarray, "N H W 3"], list[str]]:
        """Images of the same prompts from the same noise whenever it is called, and the prompts. No reward is asked.

        Costs one batch, by the program that ``collect`` has compiled or will need.

        Args:
          params: the trained parameters of the policy that samples.
          count: of images, each of its own prompt; at most those of one batch.
        """
        plan = self._plan
        count = min(count, plan.batch_size)
        prompts, _ = self._prompt_fn(random.generator(plan.seed, 0, Stream.FIXED_PROMPTS), count)
        key = random.epoch_key(plan.seed, random.FIXED_EPOCH)
        return self._sampler.images(params, prompts, np.arange(count), key, plan.batch_size), prompts
