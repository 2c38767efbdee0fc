"""The value network's own learner: regression on the final reward, beside the policy's updates.

To the policy's loss a value is data (``ValuedMinibatch.values``): the network is updated first, then predicts, then the
policy is updated. Rewards are raw and may be of any scale (kilobytes, a score around 5, 0 to 1), while AdamW moves a
weight by at most about its learning rate per update. So V = shift + scale * network, where shift and scale are the mean
and standard deviation of the rewards of the first minibatch, fixed from then on: V starts at the mean reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from ddpo_jax import sharding
from ddpo_jax.models.functional import functional
from ddpo_jax.models.value import ValueNetwork
from ddpo_jax.ops import masked
from ddpo_jax.training.learner import Minibatch, algorithm_batch
from ddpo_jax.types import AnyArray, Batch, Params, StepTerms


@struct.dataclass
class ValueState:
    """What an update changes; part of the run's ``TrainState``, hence of its checkpoints. Replicated: it is small."""

    params: Params
    opt_state: optax.OptState
    shift: Float[Array, ""]  # of the reward, see the module's docstring
    scale: Float[Array, ""]
    step: Int[Array, ""]  # updates done


class ValueLearner:
    """Holds what never changes during training and compiles update and prediction once."""

    def __init__(
        self,
        loss: Callable[[StepTerms, Batch], Array],
        timesteps: Num[Array, " T"],
        channels: int,
        context_dim: int,
        learning_rate: float,
        mesh: Mesh,
        seed: int,
    ):
        """Args:
        loss: the algorithm's ``value_loss``: unreduced, [N, S].
        timesteps: of the noise process, at each step.
        channels: of the latents.
        context_dim: of the text embeddings.
        learning_rate: of AdamW.
        mesh: of devices; samples are split over both of its axes.
        seed: of the initial parameters.
        """
        self._loss, self._timesteps, self._mesh = loss, timesteps, mesh
        network, self._params, _ = functional(ValueNetwork(channels, context_dim, rngs=nnx.Rngs(seed)), lambda _: True)
        self._network: Callable[..., Array] = network
        self._tx = optax.adamw(learning_rate)
        self.update = jax.jit(self._update)
        self.predict = jax.jit(self._predict)

    def init(self) -> ValueState:
        """The state before the first update."""
        state = ValueState(
            params=self._params,
            opt_state=self._tx.init(self._params),
            shift=jnp.zeros(()),
            scale=jnp.ones(()),
            step=jnp.int32(0),
        )
        return sharding.replicate(state, self._mesh)

    def _update(self, state: ValueState, batch: Minibatch) -> tuple[ValueState, dict[str, Array]]:
        """One AdamW step on the mean loss over all trained pairs of a minibatch.

        Returns:
          The state, and ``value_loss`` (before the step, in squared units of the reward).
        """
        state, loss, grads = self._sharded(self._gradient, P())(state, batch)
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), {"value_loss": loss}

    def _predict(self, state: ValueState, batch: Minibatch) -> Float[Array, "N S"]:
        """The values of all trained pairs of a minibatch."""

        def all_values(state: ValueState, batch: Minibatch) -> Array:
            columns = jnp.arange(batch.steps.shape[1])
            return jax.lax.map(lambda column: self._values(state.params, state, batch, column), columns).T

        return self._sharded(all_values, sharding.BATCH)(state, batch)

    def _sharded(self, function: Callable[[ValueState, Minibatch], Any], out_specs: Any) -> Callable[..., Any]:
        """``function(state, batch)`` on every device's own samples."""
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=(P(), sharding.BATCH), out_specs=out_specs, check_vma=False
        )

    def _gradient(self, state: ValueState, batch: Minibatch) -> tuple[ValueState, Array, Params]:
        """On one device: the state with its shift and scale, and loss and gradient of the whole minibatch."""
        pairs = jnp.maximum(_total(batch.mask), 1)
        rewards = batch.rewards[:, None]
        mean = _total(batch.mask * rewards) / pairs
        std = jnp.sqrt(_total(batch.mask * jnp.square(rewards - mean)) / pairs)
        first = state.step == 0
        state = dataclasses.replace(
            state,
            shift=jnp.where(first, mean, state.shift),
            scale=jnp.where(first, jnp.where(std > 0, std, 1.0), state.scale),
        )
        data = algorithm_batch(batch, clip_range=0.0)  # which no value loss reads

        def loss_of(params: Params, column: Array) -> Array:
            terms = StepTerms(value=self._values(params, state, batch, column)[:, None])
            picked = jax.tree.map(lambda x: x[:, column][:, None] if x.ndim == 2 else x, data)
            return masked.total(self._loss(terms, picked), picked.mask) / pairs

        def accumulate(carry: tuple[Array, Params], column: Array) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_of)(state.params, column)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), _ = jax.lax.scan(accumulate, zero, jnp.arange(batch.steps.shape[1]))
        return state, *jax.lax.psum((loss, grads), sharding.BATCH_AXES)

    def _values(self, params: Params, state: ValueState, batch: Minibatch, column: Array) -> Float[Array, " N"]:
        """V before one trained step of every sample."""
        steps = batch.steps[:, column]
        latents = batch.latents[jnp.arange(len(steps)), steps]
        return state.shift + state.scale * self._network(params, {}, latents, self._timesteps[steps], batch.context)


def _total(x: AnyArray) -> Array:
    """The sum over all devices."""
    return jax.lax.psum(x.sum(), sharding.BATCH_AXES)
