"""The nouns every room shares: what a policy sampled, what the learner computes, what an algorithm declares.

Axes: N samples, T denoising steps (0 = noisiest), S trained steps of each sample (S <= T), h w c latents.
Log-probabilities are averaged over the ``num_dims = h*w*c`` latent dimensions, never summed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


class Spread:
    """A host array of N samples whose rows stay in the processes that made them.

    It is indexed and concatenated like a numpy array, equally in every process; no row moves by that. ``hosts.rows``
    moves rows where they are needed.

    Attributes:
      owner: the process that has each row [N].
      rows: the rows of this process as arrays, None for those of others [N].
      shape, dtype: of the whole.
    """

    def __init__(self, owner: Int[np.ndarray, " N"], rows: np.ndarray, row_shape: tuple[int, ...], dtype: Any):
        self.owner, self.rows = owner, rows
        self.shape, self.dtype = (len(owner), *row_shape), np.dtype(dtype)

    def __getitem__(self, index: Any) -> Spread:
        return Spread(self.owner[index], self.rows[index], self.shape[1:], self.dtype)

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, over all processes."""
        return math.prod(self.shape) * self.dtype.itemsize


HostArray = np.ndarray | Spread
AnyArray = Array | np.ndarray  # on a device or on the host
Params = dict[str, Array]  # network parameters by dotted name
TERMS = ("log_prob", "ref_log_prob", "kl", "noise_mse", "denoise_mse", "value")


@struct.dataclass
class Trajectory:
    """A denoising trajectory of every sample, as the sampler returns it."""

    latents: Float[Array, "N T1 h w c"]  # T1 = T + 1; latents[:, 0] is the initial noise, latents[:, T] is decoded
    log_prob: Float[Array, "N T"]  # of latents[:, t + 1] given latents[:, t], under the policy that sampled it


@struct.dataclass
class ScoredSamples:
    """Trajectories with rewards and advantages, on the host: what an epoch trains on and what replay keeps.

    Replay saves these fields by name in a run's checkpoints, so their names are part of that format.
    """

    latents: Float[HostArray, "N T1 h w c"]
    log_prob: Float[np.ndarray, "N T"]
    weights: Float[np.ndarray, "N T"]  # timestep weights, mean 1 over the trained steps
    mask: Float[np.ndarray, "N T"]  # 1 where the step of the sample may be trained
    context: Float[HostArray, "N L D"]  # prompt embeddings
    prompt_ids: Int[np.ndarray, " N"]  # 63-bit hash of the prompt
    group_ids: Int[np.ndarray, " N"]  # equal for the K samples of one draw of a prompt
    rewards: Float[np.ndarray, " N"]
    advantages: Float[np.ndarray, " N"]  # in double precision until they are replayed or reach a device

    def __getitem__(self, index: Any) -> ScoredSamples:
        """The samples that a numpy index picks."""
        return jax.tree.map(lambda x: x[index], self)

    def __len__(self) -> int:
        return len(self.rewards)


@struct.dataclass
class StepTerms:
    """Scalars per (sample, trained step) that depend on the parameters. What an algorithm did not ask for is None."""

    log_prob: Float[Array, "N S"] | None = None
    ref_log_prob: Float[Array, "N S"] | None = None  # under the reference policy; carries no gradient
    kl: Float[Array, "N S"] | None = None  # KL(policy || reference) of the step, mean over latent dimensions
    noise_mse: Float[Array, "N S"] | None = None  # mean squared difference of policy and reference noise prediction
    denoise_mse: Float[Array, "N S"] | None = None  # denoising loss of the final latents at a random timestep
    value: Float[Array, "N S"] | None = None  # learned value of (latents, prompt, step)


@struct.dataclass
class Batch:
    """Data of the trained (sample, step) pairs that does not depend on the parameters."""

    old_log_prob: Float[AnyArray, "N S"]  # under the policy that sampled the trajectory
    advantages: Float[AnyArray, " N"]
    rewards: Float[AnyArray, " N"]
    prompt_ids: Int[AnyArray, " N"]  # equal for samples of the same prompt
    mask: Float[AnyArray, "N S"]  # 1 where the pair is trained, 0 where it is padding or excluded
    clip_range: float = struct.field(pytree_node=False, default=1e-4)  # on the mean log-prob ratio
    num_dims: int = struct.field(pytree_node=False, default=1)  # latent dimensions: sum = mean * num_dims


@dataclasses.dataclass(frozen=True)
class Traits:
    """What an algorithm uses; the learner, replay and validation read it so that they need not know algorithms.

    Attributes:
      terms: names of the ``StepTerms`` fields the loss reads.
      separable: the loss of a pair (n, s) depends on the terms of that pair alone: one pass over the network.
        Otherwise one extra forward pass collects all terms before the coefficients are formed, and a column s must
        hold the same step of every sample in the minibatch, all trained steps of it (no timestep_fraction < 1).
      on_policy: right only for samples of the current policy: by default an epoch is one update, several are warned of
        and replay is refused. Others correct for a policy that has moved (importance ratio) or are regressions that
        hold for any sampler.
      group: the baseline or the loss compares samples of a prompt: 2 or more of each, kept together in a minibatch. In
        replay they are kept together only where the loss couples them: a baseline is in their advantages already.
      prompt_stats: the advantages compare a sample with what its prompt earned recently (``PromptStats``).
      standardized: advantages are in standard deviations of the reward, so ``adv_clip_max`` applies to them.
      shared_noise: all samples of a prompt in a rollout start from the same initial noise.
      branching: a rollout shares the first steps of a prompt's samples; the module has ``interval`` and ``select``.
      refresh_every: epochs between copies of the trained policy to the one that samples; 1 is online, 0 is never
        (samples of the pretrained model: offline).
      value_updates: updates of the value network for one of the policy; 0 where there is none. With one, the module
        has ``value_loss`` and the network its own AdamW at ``value_learning_rate``.
      value_learning_rate: see ``value_updates``.
      doubts: what the options allow but is seldom meant, a line each, for the log of a run.
    """

    terms: frozenset[str]
    separable: bool = True
    on_policy: bool = False
    group: bool = False
    prompt_stats: bool = False
    standardized: bool = True
    shared_noise: bool = False
    branching: bool = False
    refresh_every: int = 1
    value_updates: int = 0
    value_learning_rate: float = 0.0
    doubts: tuple[str, ...] = ()

    @property
    def whole_groups(self) -> bool:
        """Whether the samples of a prompt must be replayed together: the loss itself compares them."""
        return self.group and not self.separable

    @property
    def needs_reference(self) -> bool:
        """Whether a term is of the pretrained model."""
        return bool(self.terms & {"ref_log_prob", "kl", "noise_mse"})

    @property
    def pair_calls(self) -> int:
        """What training a (sample, step) pair costs, in calls of the denoiser.

        A forward and a backward pass are about three; the terms of a coupled loss take another forward pass, those of
        the pretrained model one of its own.
        """
        return 3 + (not self.separable) + self.needs_reference

    @property
    def per_prompt(self) -> bool:
        """Whether what all samples of a prompt have in common does not matter: rewards may be standardised in it."""
        return self.group or self.prompt_stats

    @property
    def importance_ratio(self) -> bool:
        """Whether a rollout serves several updates rightly; the opposite of ``on_policy``."""
        return not self.on_policy
