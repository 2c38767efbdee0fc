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
from ml_collections import ConfigDict

from ddpo_jax import config as configs
from ddpo_jax import find, sharding
from ddpo_jax.diffusion import schedule
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.learner import Learner, NetworkFn, Objective, make_optimizer
from ddpo_jax.models import lora, pipeline
from ddpo_jax.models.functional import functional
from ddpo_jax.prompts import make_prompts
from ddpo_jax.replay.buffer import Buffer
from ddpo_jax.reward_runner import RewardRunner, make_reward
from ddpo_jax.rollout import Collector
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
    collector: Collector
    replay: Buffer
    reward: RewardRunner
    mesh: Mesh
    uncond: jax.Array


def load_model(config: ConfigDict) -> Model:
    """Loads ``config.model`` and splits its UNet by what ``config.train`` trains."""
    dtype = jnp.dtype(config.dtype)
    revision, on_host = config.revision or None, config.frozen_on_host
    pipe = pipeline.load(config.model, dtype=dtype, revision=revision, frozen_on_host=on_host)
    pipe.unet.attention = config.attention
    pipe.unet.remat = "block" if config.train.remat == "on" else "none"
    if config.train.lora_rank:
        lora.add(pipe.unet, config.train.lora_rank, config.train.lora_targets, nnx.Rngs(config.seed))
        network, params, frozen = functional(pipe.unet, lora.is_lora)
        frozen = {name: x.astype(dtype) for name, x in frozen.items()}
        reference = {name: jnp.zeros_like(x) for name, x in params.items()}  # the adapter off
    else:
        network, params, frozen = functional(pipe.unet, lambda name: True)
        reference = {name: x.astype(dtype) for name, x in params.items()}
    return Model(pipe, network, params, frozen, reference)


def build(config: ConfigDict) -> Parts:
    """Builds a run from a resolved, valid config.

    Raises:
      ValueError: a model, weight or option that cannot be had, in one line each.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    reward = make_reward(config.reward)
    prompt_fn = make_prompts(config.prompts)
    algorithm = find.find("algorithms", config.algorithm.name)
    weighting = find.find("weighting", config.weighting.name)
    traits = algorithm.traits(config.algorithm)

    model = load_model(config)
    pipe = model.pipeline
    num_dims = int(np.prod(pipe.latent_shape))
    if config.train.clip_range is None:
        config.train.clip_range = configs.default_clip_range(num_dims)
    policy = Policy(
        network=model.network,
        schedule=schedule.make(pipe.scheduler_config, config.sample.num_steps, config.sample.eta),
        guidance_scale=config.sample.guidance_scale,
        stop_uncond_gradient=config.train.stop_uncond_gradient,
    )
    untrained = np.flatnonzero(~policy.schedule.trainable)
    if untrained.size:
        logging.info("steps %s have no noise, hence no density: they are sampled but not trained", untrained.tolist())
    learner = Learner(
        policy,
        model.network,
        Objective(traits, functools.partial(algorithm.loss, config=config.algorithm), config.train.clip_range),
        make_optimizer(config.train),
        mesh,
        config.train.microbatch_size,
        config.train.ema_decay,
    )
    runner = RewardRunner(reward, name=config.reward.name)
    collector = Collector(
        policy,
        model.network,
        mesh,
        pipe.latent_shape,
        functools.partial(weighting.weights, config=config.weighting),
        pipe.embed,
        pipe.decode,
        prompt_fn,
        runner,
        seed=config.seed,
        batch_size=config.sample.batch_size,
        num_batches=config.sample.num_batches_per_epoch,
        samples_per_prompt=config.prompts.samples_per_prompt,
        shared_noise=traits.shared_noise,
    )
    rule = find.find("replay", config.replay.name)
    replay = Buffer(rule, config.replay, whole_groups=traits.group, num_devices=mesh.size)
    needs_reference = bool(traits.terms & {"ref_log_prob", "kl", "noise_mse"})
    model.reference = sharding.put_params(model.reference if needs_reference else {}, mesh)
    model.frozen = sharding.put_params(model.frozen, mesh)
    uncond = sharding.replicate(jnp.asarray(pipe.embed([""])[0]), mesh)
    return Parts(algorithm, traits, model, learner, collector, replay, runner, mesh, uncond)


def describe(parts: Parts, config: ConfigDict) -> str:
    """The start-up log: a table of the trained parameters and one line on everything that was chosen."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(parts.model.params, include_stats=False, max_lines=12)
    devices = f"{parts.mesh.size} x {jax.devices()[0].device_kind}"
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
