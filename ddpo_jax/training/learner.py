"""The learner: scalars per (sample, step) -> coefficients -> one gradient, summed over microbatches, steps and devices.

For a loss L on StepTerms, the gradient is  sum over (n, s) of  dL/dterm[n, s] * grad term[n, s].  A separable loss
gives its coefficients microbatch by microbatch (one pass); a loss that couples steps or samples gets all terms from one
extra forward pass first. Memory holds one microbatch of one step, whatever T is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ddpo_jax import sharding
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.ops import gaussian, masked
from ddpo_jax.ops.running import Max, Mean
from ddpo_jax.types import AnyArray, Batch, Params, StepTerms, Traits

Stats = dict[str, Any]  # Mean or Max by name
Parts = list[tuple[Callable[[StepTerms, Batch], Array], AnyArray]]  # of a loss, each with its weights [N, S]


@struct.dataclass
class TrainState:
    """What an update changes; all of it is checkpointed."""

    params: Params
    opt_state: optax.OptState
    ema: Params  # exponential moving average of params; empty when it is off
    behaviour: Params  # what samples, where that is not always params (Traits.refresh_every); else empty
    step: Int[Array, ""]  # updates done
    value: Any = struct.field(default_factory=dict)  # value.ValueState where the algorithm has a value network


@struct.dataclass
class Minibatch:
    """The samples of one update, with the (sample, step) pairs to train. Leading axis N everywhere."""

    latents: Float[Any, "N T1 h w c"]  # AnyArray, or Spread until it is put on the devices
    context: Float[Any, "N L D"]
    old_log_prob: Float[AnyArray, "N T"]
    advantages: Float[AnyArray, " N"]
    rewards: Float[AnyArray, " N"]
    prompt_ids: Int[AnyArray, " N"]
    steps: Int[AnyArray, "N S"]  # the trained steps of each sample
    step_weight: Float[AnyArray, "N S"]  # timestep weight of each, mean 1 over a trajectory
    penalty_weight: Float[AnyArray, "N S"]  # the same for an algorithm's penalty, which weights may leave alone
    mask: Float[AnyArray, "N S"]  # 0 where a pair is padding
    seeds: Int[AnyArray, " N"]  # of the random timesteps and noise of denoise_mse


@struct.dataclass
class ValuedMinibatch(Minibatch):
    """A minibatch and what a value network says of its pairs."""

    values: Float[AnyArray, "N S"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """An algorithm as the learner sees it."""

    traits: Traits
    loss: Callable[[StepTerms, Batch], Array]
    clip_range: float
    penalty: Callable[[StepTerms, Batch], Array] | None = None  # a part of the loss with weights of its own


def algorithm_batch(batch: Minibatch, clip_range: float) -> Batch:
    """The algorithm's view of a minibatch."""
    return Batch(
        old_log_prob=jnp.take_along_axis(batch.old_log_prob, batch.steps, axis=1),
        advantages=batch.advantages,
        rewards=batch.rewards,
        prompt_ids=batch.prompt_ids,
        mask=batch.mask,
        clip_range=clip_range,
        num_dims=batch.latents[0, 0].size,
    )


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm (keys of ``config.train``)."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            config.learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        ),
    )


class Learner:
    """Holds what never changes during training and compiles the update once."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        microbatch_size: int,
        ema_decay: float = 0.0,
        rules: tuple[sharding.Rule, ...] = sharding.DEFAULT_RULES,
    ):
        """Args:
        policy: noise process, network and guidance.
        objective: loss and traits of the algorithm.
        tx: optimizer.
        mesh: of devices; samples are split over both of its axes.
        microbatch_size: samples per network call on one device.
        ema_decay: of the average of the parameters; 0 turns it off.
        rules: by which parameters, optimizer state and averages are split over the mesh.
        """
        self._policy, self._objective, self._tx = policy, objective, tx
        self._mesh, self._microbatch, self._ema_decay, self._rules = mesh, microbatch_size, ema_decay, rules
        self.update = jax.jit(self._update, donate_argnums=0)
        self.log_prob = jax.jit(self._log_prob)

    def init(self, params: Params) -> TrainState:
        """The state before the first update. Copies ``params``: updates donate their buffers."""

        copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))  # one program, not one for every shape

        def copy() -> Params:
            return sharding.put_params(copies(params), self._mesh, self._rules)

        return TrainState(
            params=copy(),
            opt_state=sharding.put_params(jax.jit(self._tx.init)(params), self._mesh, self._rules),
            ema=copy() if self._ema_decay else {},
            behaviour=copy() if self._objective.traits.refresh_every != 1 else {},
            step=sharding.replicate(jnp.int32(0), self._mesh),
        )

    def _update(
        self, state: TrainState, reference: Params, frozen: Params, uncond: Array, batch: Minibatch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on a minibatch: ``(state, metrics)``."""
        split = sharding.param_specs(state.params, self._mesh, self._rules)
        grads, metrics = self._sharded(self._gradient, (split, P()))(state.params, reference, frozen, uncond, batch)
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - self._ema_decay) if self._ema_decay else state.ema
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema, step=state.step + 1), metrics

    def _log_prob(
        self, params: Params, reference: Params, frozen: Params, uncond: Array, batch: Minibatch
    ) -> StepTerms:
        """All terms [N, S] of a minibatch, without gradient."""

        def terms(*args: Any) -> StepTerms:
            return _map_pairs(partial(self._terms, *args), args[-1], self._microbatch)

        return self._sharded(terms, sharding.BATCH)(params, reference, frozen, uncond, batch)

    def _sharded(self, function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
        """``function(params, reference, frozen, uncond, batch)`` on every device's own samples and whole parameters."""
        return sharding.per_device(function, self._mesh, 3, (P(), sharding.BATCH), out_specs, self._rules)

    def _gradient(
        self, params: Params, reference: Params, frozen: Params, uncond: Array, batch: Minibatch
    ) -> tuple[Params, dict[str, Array]]:
        """On one device: the gradient of the whole minibatch's loss (summed over devices) and its metrics."""
        traits = self._objective.traits
        parts: Parts = [(self._objective.loss, batch.step_weight)]
        if self._objective.penalty is not None:
            parts.append((self._objective.penalty, batch.penalty_weight))
        pairs = jnp.maximum(jax.lax.psum(batch.mask.sum(), sharding.BATCH_AXES), 1)
        data = algorithm_batch(batch, self._objective.clip_range)

        def terms_of(params: Params, rows: Array, column: Array) -> StepTerms:
            return self._terms(params, reference, frozen, uncond, batch, rows, column)

        coefficients: StepTerms | None = None  # dL/dterms of all pairs, where the loss couples them
        if not traits.separable:
            everything = _map_pairs(partial(terms_of, params), batch, self._microbatch)
            loss, coefficients = self._coefficients(everything, data, parts)

        def weighted(terms: StepTerms, rows: Array, column: Array) -> Array:
            """What a microbatch adds to a separable loss."""
            picked = jax.tree.map(lambda x: x[rows, column][:, None] if x.ndim == 2 else x[rows], data)
            losses = sum(masked.fill(part(terms, picked), picked.mask) * w[rows, column][:, None] for part, w in parts)
            return (losses * picked.mask).sum() / pairs

        def slopes(terms: StepTerms, rows: Array, column: Array) -> StepTerms:
            """The derivative of the loss by every term of a microbatch."""
            if coefficients is None:
                return jax.grad(weighted)(terms, rows, column)
            return jax.tree.map(lambda c: c[rows, column][:, None], coefficients)

        def surrogate(params: Params, rows: Array, column: Array) -> tuple[Array, StepTerms]:
            """A scalar whose gradient is this microbatch's part of the loss's, and the terms."""
            terms = terms_of(params, rows, column)
            if coefficients is None:
                return weighted(terms, rows, column), terms
            products = jax.tree.map(jnp.multiply, slopes(terms, rows, column), terms)
            return sum((x.sum() for x in jax.tree.leaves(products)), jnp.zeros(())), terms

        def accumulate(carry: tuple[Params, Array, Stats], index: tuple[Array, Array]) -> tuple[Any, None]:
            grads, total, stats = carry
            (part, terms), grad = jax.value_and_grad(surrogate, has_aux=True)(params, *index)
            new = _statistics(terms, slopes(terms, *index), data, self._objective.clip_range, *index)
            stats = {name: value.merge(new[name]) for name, value in stats.items()}
            return (jax.tree.map(jnp.add, grads, grad), total + part, stats), None

        indices = _pair_indices(batch, self._microbatch)
        zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), _no_statistics(traits))
        (grads, total, stats), _ = jax.lax.scan(accumulate, zero, indices)

        out = {name: value.over(sharding.BATCH_AXES).compute() for name, value in stats.items()}
        out["loss"] = jax.lax.psum(total, sharding.BATCH_AXES) if traits.separable else loss
        return sharding.scatter_grads(grads, sharding.param_specs(params, self._mesh, self._rules)), out

    def _coefficients(self, terms: StepTerms, data: Batch, parts: Parts) -> tuple[Array, StepTerms]:
        """Loss and dL/dterms [n, S] of this device's samples, for a loss that needs the terms of all samples.

        The weights multiply the derivatives: what couples the steps is the loss as its paper has it.
        """
        axes = sharding.BATCH_AXES
        everyone = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        all_terms, all_data = jax.tree.map(everyone, terms), jax.tree.map(everyone, data)
        start = jax.lax.axis_index(axes) * data.mask.shape[0]

        def own(part: Callable[[StepTerms, Batch], Array], weight: AnyArray) -> tuple[Array, StepTerms]:
            value, slopes = jax.value_and_grad(lambda t: part(t, all_data).mean())(all_terms)
            mine = jax.tree.map(lambda c: jax.lax.dynamic_slice_in_dim(c, start, data.mask.shape[0]), slopes)
            return value, jax.tree.map(lambda c: c * weight, mine)

        return functools.reduce(partial(jax.tree.map, jnp.add), [own(*part) for part in parts])

    def _terms(
        self,
        params: Params,
        reference: Params,
        frozen: Params,
        uncond: Array,
        batch: Minibatch,
        rows: Int[Array, " M"],
        column: Int[Array, ""],
    ) -> StepTerms:
        """The terms the algorithm asks for, of one trained step of M samples: each [M, 1]."""
        wanted = self._objective.traits.terms
        policy = self._policy
        steps, context = batch.steps[rows, column], batch.context[rows]
        latents, next_latents = batch.latents[rows, steps], batch.latents[rows, steps + 1]
        out: dict[str, Array] = {}
        if wanted & {"log_prob", "ref_log_prob", "kl", "noise_mse"}:
            mean, std, output = policy.step(params, frozen, latents, steps, context, uncond)
            if "log_prob" in wanted:
                out["log_prob"] = gaussian.log_prob(next_latents, mean, std)
            if wanted & {"ref_log_prob", "kl", "noise_mse"}:
                ref_mean, _, ref_output = jax.lax.stop_gradient(
                    policy.step(reference, frozen, latents, steps, context, uncond)
                )
                if "ref_log_prob" in wanted:
                    out["ref_log_prob"] = gaussian.log_prob(next_latents, ref_mean, std)
                if "kl" in wanted:
                    out["kl"] = gaussian.kl(mean, ref_mean, std)
                if "noise_mse" in wanted:
                    out["noise_mse"] = jnp.mean((output - ref_output) ** 2, axis=(1, 2, 3))
        if "denoise_mse" in wanted:
            out["denoise_mse"] = self._denoise_mse(params, frozen, batch, rows, column, steps, context, uncond)
        if "value" in wanted and isinstance(batch, ValuedMinibatch):
            out["value"] = batch.values[rows, column]
        return StepTerms(**{name: value[:, None] for name, value in out.items()})

    def _denoise_mse(
        self,
        params: Params,
        frozen: Params,
        batch: Minibatch,
        rows: Array,
        column: Array,
        steps: Array,
        context: Array,
        uncond: Array,
    ) -> Float[Array, " M"]:
        """The denoising loss of the final latents at a random training timestep (Black et al. 2023, Eq. 1).

        The trained steps share the training timesteps equally, the first of them the noisiest; a step draws from its
        share. All steps together are the uniform distribution, and a timestep weighting weighs noise levels.
        """
        transition, clean = self._policy.transition, batch.latents[rows, -1]
        trained = jnp.cumsum(transition.trainable)  # how many up to and including each step
        bounds = jnp.arange(len(trained) + 1) * transition.num_train_timesteps // trained[-1]  # from the least noisy

        def draw(seed: Array, step: Array) -> tuple[Array, Array]:
            t_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), column))
            place = trained[-1] - trained[step]
            t = jax.random.randint(t_key, (), bounds[place], bounds[place + 1])
            return t, jax.random.normal(noise_key, clean.shape[1:])

        timesteps, noise = jax.vmap(draw)(batch.seeds[rows], steps)
        noised, target = transition.add_noise(clean, noise, timesteps)
        output = self._policy.model_output(params, frozen, noised, timesteps, context, uncond)
        return jnp.mean((output - target) ** 2, axis=(1, 2, 3))


def _pair_indices(batch: Minibatch, microbatch: int) -> tuple[Int[Array, "I M"], Int[Array, " I"]]:
    """``(rows, column)`` of every network call: microbatches of samples x trained steps."""
    samples, steps = batch.steps.shape
    microbatch = math.gcd(samples, microbatch)  # a replayed batch may be smaller than an ordinary one
    rows = jnp.arange(samples).reshape(-1, microbatch)
    columns = jnp.arange(steps)
    return jnp.repeat(rows, steps, axis=0), jnp.tile(columns, len(rows))


def _map_pairs(terms_of: Callable[[Array, Array], StepTerms], batch: Minibatch, microbatch: int) -> StepTerms:
    """The terms of all pairs [n, S], one microbatch of one step at a time."""
    samples, steps = batch.steps.shape
    microbatch = math.gcd(samples, microbatch)

    def values(index: tuple[Array, Array]) -> dict[str, Array]:
        terms = vars(terms_of(*index))
        return {name: value[:, 0] for name, value in terms.items() if value is not None}

    stacked = jax.lax.map(values, _pair_indices(batch, microbatch))  # [I, M] each

    def arrange(x: Array) -> Array:
        return x.reshape(samples // microbatch, steps, microbatch).swapaxes(1, 2).reshape(samples, steps)

    return StepTerms(**{name: arrange(x) for name, x in stacked.items()})


def _no_statistics(traits: Traits) -> Stats:
    """The neutral elements of what ``_statistics`` returns."""
    means: list[str] = [name for name in ("kl", "noise_mse", "denoise_mse") if name in traits.terms]
    if "log_prob" not in traits.terms:
        return {name: Mean.empty() for name in means}
    means += ["approx_kl", "clip_fraction", "zero_gradient_fraction"]
    return {name: Mean.empty() for name in means} | {"ratio_deviation": Max.empty()}


def _statistics(
    terms: StepTerms, slopes: StepTerms, data: Batch, clip_range: float, rows: Array, column: Array
) -> Stats:
    """What the metrics say of one microbatch.

    These are the extra terms, the k3 estimate of the KL to the rollout's policy (Schulman 2020, "Approximating KL
    divergence"), the share of ratios outside the clip range on either side, the share of pairs whose log_prob has no
    gradient (PPO's clip takes it on one side only, where the policy has already moved as the advantage asks), and the
    largest distance of a ratio from 1.

    Args:
      terms: of the microbatch, [M, 1] each.
      slopes: the loss's derivative by each term.
      data, clip_range, rows, column: which pairs they are of.
    """
    mask = data.mask[rows, column]
    extra = {"kl": terms.kl, "noise_mse": terms.noise_mse, "denoise_mse": terms.denoise_mse}
    out: Stats = {name: Mean.of(value[:, 0], mask) for name, value in extra.items() if value is not None}
    if terms.log_prob is None or slopes.log_prob is None:
        return out
    log_ratio = terms.log_prob[:, 0] - data.old_log_prob[rows, column]
    deviation = jnp.abs(jnp.expm1(log_ratio)) * mask
    out["approx_kl"] = Mean.of(jnp.expm1(log_ratio) - log_ratio, mask)
    out["clip_fraction"] = Mean.of((deviation > clip_range).astype(jnp.float32), mask)
    out["zero_gradient_fraction"] = Mean.of((slopes.log_prob[:, 0] == 0).astype(jnp.float32), mask)
    out["ratio_deviation"] = Max.of(deviation)
    return out
