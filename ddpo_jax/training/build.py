"""From a config to the parts of a run: the one place that knows networks, algorithm, reward and devices together."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.config.model import scheduler_config
from ddpo_jax.config.ready import Ready
from ddpo_jax.config.resolve import other_reward
from ddpo_jax.diffusion import transition
from ddpo_jax.diffusion.policy import NetworkFn, Policy
from ddpo_jax.errors import InputError
from ddpo_jax.models import lora, pipeline
from ddpo_jax.models.functional import functional
from ddpo_jax.prompts import make_prompts
from ddpo_jax.replay.buffer import Buffer
from ddpo_jax.rewards._shared.check import RewardFn
from ddpo_jax.rewards._shared.groups import in_groups
from ddpo_jax.rollout import everywhere
from ddpo_jax.rollout.collector import Collector, Plan
from ddpo_jax.rollout.sampler import ImageSampler, Weighting
from ddpo_jax.rollout.scoring import RewardRunner
from ddpo_jax.training.evaluation import Evaluation
from ddpo_jax.training.learner import Learner, Objective, TrainState, make_optimizer
from ddpo_jax.training.value import ValueLearner
from ddpo_jax.types import Params, Traits


@dataclasses.dataclass
class Model:
    """A pipeline whose UNet is split into a pure function, trained and frozen parameters."""

    pipeline: pipeline.Pipeline
    network: NetworkFn
    params: Params
    frozen: Params
    reference: Params  # trained parameters of the reference policy


@dataclasses.dataclass
class Parts:
    """What an epoch needs."""

    algorithm: types.ModuleType
    traits: Traits
    model: Model
    learner: Learner
    sampler: ImageSampler
    collector: Collector
    replay: Buffer
    reward: RewardRunner
    mesh: Mesh
    uncond: jax.Array
    value: ValueLearner | None  # where the algorithm has a value network
    evaluation: Evaluation | None  # where ``log.evaluate_every`` asks for it

    def init(self) -> TrainState:
        """The state before the first update; call it once.

        Leaves shapes in ``model.params``: the parameters would stay beside their copy in the state.
        """
        state = self.learner.init(self.model.params)
        self.model.params = jax.eval_shape(lambda params: params, self.model.params)
        return state if self.value is None else dataclasses.replace(state, value=self.value.init())

    @property
    def trained_steps(self) -> Bool[np.ndarray, " T"]:
        """The steps that have a density."""
        return np.asarray(self.sampler.policy.transition.trainable)


def load_model(config: ConfigDict) -> Model:
    """Loads ``config.model`` and splits its UNet by what ``config.train`` trains.

    Raises:
      InputError: the model cannot be had or sampled; a noise process that is not supported is known before any weight.
    """
    options = config.sample
    transition.make(scheduler_config(config.model, config.revision), options.num_steps, options.eta)
    dtype = jnp.dtype(config.dtype)
    revision, on_host = config.revision or None, config.frozen_on_host
    return split_model(config, pipeline.load(config.model, dtype=dtype, revision=revision, frozen_on_host=on_host))


def split_model(config: ConfigDict, pipe: pipeline.Pipeline) -> Model:
    """The UNet of ``pipe``, which may hold shapes in place of arrays, split by what ``config.train`` trains.

    Shapes are left in ``pipe.unet``: its float32 weights would stay beside their copy in the compute type.
    """
    dtype = jnp.dtype(config.dtype)
    pipe.unet.attention = config.attention
    pipe.unet.remat = "block" if config.train.remat == "on" else "none"
    rank = config.train.lora_rank
    if rank:
        lora.add(pipe.unet, rank, config.train.lora_targets, nnx.Rngs(config.seed))
    network, params, frozen = functional(pipe.unet, lora.is_lora if rank else lambda name: True, release=True)

    def convert(params: Params, frozen: Params) -> tuple[Params, Params]:
        cast = {name: x.astype(dtype) for name, x in frozen.items()}
        if rank:  # adapters off
            return cast, jax.tree.map(jnp.zeros_like, params)
        # The untrained parameters as the policy uses them: scales and biases of norms in float32.
        return cast, {name: x if x.ndim < 2 else x.astype(dtype) for name, x in params.items()}

    shapes_only = _is_shape(params, frozen)
    frozen, reference = jax.eval_shape(convert, params, frozen) if shapes_only else jax.jit(convert)(params, frozen)
    return Model(pipe, network, params, frozen, reference)


def _is_shape(*trees: Params) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(trees))


def build(ready: Ready, model: Model | None = None, mesh: Mesh | None = None) -> Parts:
    """Builds a run.

    Args:
      ready: its config and members.
      model: what to train; None loads ``config.model``. Of one that holds shapes the parts only compile.
      mesh: None takes that of ``config.mesh``. With a model of shapes its devices need not be there.

    Raises:
      InputError: a model, weight or option that cannot be had, in one line each.
    """
    config, members = ready.config, ready.members
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp) if mesh is None else mesh
    algorithm, weighting, traits = members.algorithm, members.weighting, members.traits(config)
    there = None if model is not None and _is_shape(model.params, model.frozen) else mesh
    reward = everywhere.make(config.reward, members.reward, there)
    grouped = in_groups(reward, config.prompts.samples_per_prompt, config.reward.name)
    check_reward(reward, config, traits)
    prompt_fn = make_prompts(config.prompts, members.prompts)

    rules = sharding.read_rules(config.mesh.rules)
    model = load_model(config) if model is None else model
    shapes = {name: x.shape for name, x in (model.params | model.frozen).items()}
    sharding.check_rules(rules, shapes, mesh.shape["fsdp"])
    sampler = make_sampler(model, config, mesh, functools.partial(weighting.weights, config=config.weighting))
    model.frozen = sampler.frozen
    policy = sampler.policy
    untrained = np.flatnonzero(~policy.transition.trainable)
    if untrained.size:
        logging.info("steps %s have no noise, hence no density: they are sampled but not trained", untrained.tolist())
    learner = Learner(
        policy,
        objective(algorithm, traits, config),
        make_optimizer(config.train),
        mesh,
        config.train.microbatch_size,
        config.train.ema_decay,
        rules,
    )
    value = None
    if traits.value_updates:
        value = ValueLearner(
            functools.partial(algorithm.value_loss, config=config.algorithm),
            policy.transition.timesteps,
            model.pipeline.latent_shape[-1],
            model.pipeline.unet.config.cross_attention_dim,
            traits.value_learning_rate,
            mesh,
            config.seed,
        )
    runner = RewardRunner(grouped, name=config.reward.name, wait_s=config.reward.wait_s)
    plan = Plan(
        seed=config.seed,
        batch_size=config.sample.batch_size,
        num_batches=config.sample.num_batches_per_epoch,
        samples_per_prompt=config.prompts.samples_per_prompt,
        shared_noise=traits.shared_noise,
    )
    collector = Collector(sampler, prompt_fn, runner, plan)
    replay = Buffer(members.replay, config.replay, whole_groups=traits.whole_groups, num_devices=mesh.size)
    model.reference = sharding.put_params(model.reference if traits.needs_reference else {}, mesh, rules)
    evaluation = None
    if config.log.evaluate_every:
        others = {name: everywhere.make(*other_reward(config, name), there) for name in config.log.evaluate_also}
        rewards = {"reward": reward} | others
        sizes = config.log.evaluate_images, config.sample.batch_size, config.log.evaluate_every
        evaluation = Evaluation(sampler, prompt_fn, rewards, *sizes, wait_s=config.reward.wait_s)
    return Parts(
        *(algorithm, traits, model, learner, sampler, collector, replay, runner, mesh, sampler.uncond, value),
        evaluation,
    )


def check_reward(reward: RewardFn, config: ConfigDict, traits: Traits) -> None:
    """Refuses a reward that cannot be trained on so.

    Raises:
      InputError: it compares the images of a prompt, and a process has a part of them; its parts are to be
        standardised within prompts, of which there is one image each, or which the algorithm does not compare.
    """
    name, images = config.algorithm.name, config.prompts.samples_per_prompt
    each = config.sample.batch_size // jax.process_count()
    if getattr(reward, "groupwise", False) and not getattr(reward, "waits_for_others", False) and each % images:
        raise InputError(
            f"sample.batch_size: received {config.sample.batch_size}; reward {config.reward.name!r} compares the "
            f"images of a prompt, and each of the {jax.process_count()} processes scores {each}, which must be whole "
            f"groups of prompts.samples_per_prompt={images}; use {images * jax.process_count()}"
        )
    if not getattr(reward, "decoupled", {}):
        return
    if images < 2:
        raise InputError(
            f"prompts.samples_per_prompt: received {images}; reward.normalise=advantages standardises each reward over "
            "the images of a prompt, which takes at least 2; use 4"
        )
    if not traits.per_prompt:
        raise InputError(
            f"reward.normalise: received 'advantages'; algorithm {name!r} does not compare the images of a prompt, and "
            "without their mean it would lack what it learns from; use reward.normalise=none or algorithm.name=ddpo"
        )


def make_sampler(model: Model, config: ConfigDict, mesh: Mesh, weighting: Weighting | None = None) -> ImageSampler:
    """The image sampler of a model.

    Args:
      model: may hold shapes; then the sampler only compiles.
      config: its ``sample`` section says how images are drawn.
      mesh: of devices; ``model.frozen`` is copied there unless that is where it is.
      weighting: timestep weights, computed beside the trajectories.
    """
    pipe, options = model.pipeline, config.sample
    policy = Policy(
        transition.make(pipe.scheduler_config, options.num_steps, options.eta),
        model.network,
        options.guidance_scale,
        config.train.stop_uncond_gradient,
    )
    uncond: Any = jnp.asarray(pipe.embed([""])[0])
    if _is_shape(model.params, model.frozen):
        uncond = jax.ShapeDtypeStruct(uncond.shape, uncond.dtype)
    rules = sharding.read_rules(config.mesh.rules)
    frozen, uncond = sharding.put_params(model.frozen, mesh, rules), sharding.replicate(uncond, mesh)
    return ImageSampler(policy, frozen, uncond, pipe, mesh, weighting, rules)


def objective(algorithm: types.ModuleType, traits: Traits, config: ConfigDict) -> Objective:
    """The algorithm as the learner sees it, with its options filled in."""
    loss, penalty = algorithm.loss, getattr(algorithm, "penalty", None)
    return Objective(
        traits,
        functools.partial(loss, config=config.algorithm),
        config.train.clip_range,
        None if penalty is None else functools.partial(penalty, config=config.algorithm),
    )


def describe(parts: Parts, config: ConfigDict) -> str:
    """The start-up log: a table of the trained parameters and one line on everything that was chosen."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(parts.model.params, include_stats=False, max_lines=12)
    devices = f"{parts.mesh.size} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    chosen: dict[str, Any] = {
        "model": config.model,
        "devices": devices,
        "dtype": config.dtype,
        "algorithm": config.algorithm.name,
        "weighting": config.weighting.name,
        "replay": config.replay.name,
        "reward": config.reward.name,
        "prompts": config.prompts.name,
        "clip_range": f"{config.train.clip_range:.2g}",
    }
    return f"trained parameters\n{table}\n" + ", ".join(f"{key} {value}" for key, value in chosen.items())
