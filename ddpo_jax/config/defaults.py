"""Every key of the configuration with its default and its meaning, and the choice of named members.

A key is where it is used: ``sample.*`` shapes the rollout, ``train.*`` the update, and each family of interchangeable
parts (algorithm, weighting, replay, reward, prompts) has a section that holds the ``name`` of the member and the
options of that member alone. ``config.validate`` says which values go together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import errors, find
from ddpo_jax.errors import InputError

# Section of the config -> package that holds its members.
FAMILIES = {
    "algorithm": "algorithms",
    "weighting": "weighting",
    "replay": "replay",
    "reward": "rewards",
    "prompts": "prompts",
}


@dataclasses.dataclass(frozen=True)
class ByModel:
    """A default that depends on the model; the key is None until ``resolve``."""

    miniature: Any
    stable_diffusion: Any


@dataclasses.dataclass(frozen=True)
class Computed:
    """A default that ``resolve`` computes from other keys; the key is None until then."""

    type: type


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, its default (a value, ``ByModel`` or ``Computed``) and what it means."""

    name: str
    default: Any
    meaning: str


# fmt: off
KEYS = (
    Key("seed", 0, "whole number >= 0; prompts, initial noise, step noise and shuffling all follow from it"),
    Key("num_epochs", ByModel(40, 100), "epochs: rollout, rewards, update"),
    Key("model", "auto", "auto = mini on CPU, Stable Diffusion v1.5 on GPU/TPU; mini; a hub id; a diffusers folder"),
    Key("revision", "", "branch, tag or commit of a hub model; empty = the hub's main branch"),
    Key("dtype", "auto", "compute type of the networks: float32, bfloat16; auto = bfloat16 for SD on GPU/TPU"),
    Key("frozen_on_host", False, "keep text encoder and VAE in host memory while they do not run"),
    Key("attention", "auto", "attention kernel: auto, xla, cudnn, chunked, flash_tpu"),
    # The rollout.
    Key("sample.num_steps", ByModel(10, 50), "denoising steps T per image"),
    Key("sample.eta", 1.0, "noise added per DDIM step, in (0, 1]; 1 = DDPM; at 0 a step has no density to train"),
    Key("sample.guidance_scale", ByModel(1.0, 5.0),
        "classifier-free guidance w in rollout and update; 1 = no guidance; below 1 it still mixes both branches, "
        "where diffusers turns guidance off"),
    Key("sample.batch_size", ByModel(32, 8), "images sampled at once, over all devices"),
    Key("sample.num_batches_per_epoch", ByModel(4, 32), "sampling batches per epoch"),
    # The update.
    Key("train.batch_size", Computed(int), "images per optimizer update, over all devices: an epoch / its updates"),
    Key("train.microbatch_size", Computed(int), "images per forward and backward pass on one device"),
    Key("train.learning_rate", ByModel(3e-3, 3e-4), "AdamW step size, constant"),
    Key("train.weight_decay", 1e-4, "AdamW decoupled weight decay"),
    Key("train.adam_b1", 0.9, "AdamW decay of the first moment, in [0, 1)"),
    Key("train.adam_b2", 0.999, "AdamW decay of the second moment, in [0, 1)"),
    Key("train.adam_eps", 1e-8, "AdamW denominator offset"),
    Key("train.max_grad_norm", 1.0, "clip of the gradient's global norm, after averaging over images and steps"),
    Key("train.num_inner_epochs", 1, "passes over an epoch's images"),
    Key("train.clip_range", Computed(float), "trust region of the per-step ratio: 1e-4 * sqrt(16384 / latent numbers)"),
    Key("train.adv_clip_max", 10.0, "advantages are clipped to +- this, in units of the advantage"),
    Key("train.timestep_fraction", ByModel(0.3, 1.0), "part of the T steps trained per image, in (0, 1], at least one"),
    Key("train.step_sampling", "importance", "how a part is drawn, no step twice: uniform, or by weight (unbiased)"),
    Key("train.lora_rank", ByModel(8, 4), "rank of low-rank adapters on the attention; 0 = train the whole UNet"),
    Key("train.lora_targets", ("to_q", "to_k", "to_v", "to_out.0"), "layers that get an adapter: ends of their names"),
    Key("train.ema_decay", 0.0, "decay per update of an average of the parameters, in [0, 1); 0 = no average"),
    Key("train.stop_uncond_gradient", False, "leave the unconditional branch of guidance out of the gradient"),
    Key("train.remat", "auto", "recompute activations in the backward pass to save memory: on, off; auto = on for SD"),
    Key("train.recompute_log_prob", "auto", "old log-probs by the update's program: on, off; auto = on in bfloat16"),
    # The families: a member's own options join its section.
    Key("algorithm.name", "ddpo", "scores to coefficients: a file of ddpo_jax/algorithms"),
    Key("weighting.name", "uniform", "weight of each step: a file of ddpo_jax/weighting"),
    Key("weighting.kl", False, "whether the weights multiply an algorithm's KL penalty too, not the advantage alone"),
    Key("replay.name", "none", "rule that picks what is replayed, a file of ddpo_jax/replay; none = only this epoch"),
    Key("replay.k", 4, "images replayed per device and epoch, after the ordinary updates"),
    Key("replay.history", 3, "epochs a rollout stays in the buffer"),
    Key("replay.max_gib", 16.0,
        "GiB that the buffer may take, over all processes; beyond it the oldest epochs leave before their time"),
    Key("replay.updates", "one", "updates on what is replayed: one of all; ordinary = several of train.batch_size"),
    Key("reward.name", "jpeg_compressibility", "images to scores: a file of ddpo_jax/rewards"),
    Key("reward.wait_s", 600.0,
        "seconds that the reward may take for a batch; after that the run ends as a failure and is saved"),
    Key("prompts.name", "auto",
        "a file of ddpo_jax/prompts, or package.module:function; auto = mini for the miniature, animals for SD"),
    Key("prompts.samples_per_prompt", 4, "images K of each drawn prompt; group baselines compare these"),
    # Devices, and what is written.
    Key("mesh.data", -1,
        "devices that split the images only; -1 = all that fsdp leaves (CPU: cores that divide the batches)"),
    Key("mesh.fsdp", 1, "devices that split the images and also share one copy of the parameters"),
    Key("mesh.rules", (".*=largest",),
        "dimension that fsdp splits, PATTERN=WHERE by the parameter's name, first that fits: a number, largest, none"),
    Key("checkpoint.every", ByModel(5, 1), "epochs between checkpoints; the last epoch is always saved"),
    Key("checkpoint.keep", 2, "latest checkpoints kept, and that after the epoch whose images scored best"),
    Key("checkpoint.folder", "",
        "folder that gets them instead of the workdir, or gs://BUCKET/FOLDER (extra gcs); a run goes on from it in a "
        "workdir that is empty"),
    Key("log.images_every", 1, "epochs between image grids; 0 = none"),
    Key("log.num_images", 16, "images in a grid"),
    Key("log.wandb", "", "project of Weights & Biases that gets the rows and images too (extra wandb); empty = none"),
    Key("log.evaluate_every", ByModel(10, 0), "epochs between evaluations on prompts and noise of all runs; 0 = none"),
    Key("log.evaluate_images", 128, "images of an evaluation, 4 of each prompt; they are no reward queries"),
    Key("log.evaluate_also", Computed(tuple),
        "names of further rewards that score them and are not trained on; of the miniature's prompts two"),
    Key("log.profile", "", "epochs of which an xprof trace is written into profile/: 2:4 = 2 and 3; empty = none"),
    Key("log.stall_s", 900.0, "seconds without progress after which a line says what the run waits for"),
)
# fmt: on
BY_NAME = {key.name: key for key in KEYS}
OPEN = {key.name for key in KEYS if isinstance(key.default, ByModel | Computed)}  # None until ``resolve``

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# An epoch is this many updates and a microbatch at most this many images: (the miniature, Stable Diffusion).
UPDATES_PER_EPOCH = ByModel(2, 4)
MAX_MICROBATCH = ByModel(32, 2)


def default_config() -> ConfigDict:
    """Every key with its default. ``None`` = decided in ``resolve``; a value that is given stays."""
    config = ConfigDict()
    for key in KEYS:
        section, _, last = key.name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[last] = None if key.name in OPEN else key.default
    for family in FAMILIES:
        choose(config, family, config[family].name)
    config.lock()
    return config


def choose(config: ConfigDict, family: str, name: str) -> None:
    """Sets ``<family>.name`` and gives the section that member's own options, and nothing of the former member's.

    Keys of the section that belong to every member, such as ``replay.k``, keep their values.

    Args:
      config: changed in place.
      family: a section: one of ``FAMILIES``.
      name: a member's name, ``package.module``, or for rewards and prompts ``package.module:function``; for prompts
        also "auto".

    Raises:
      InputError: no such family or member; or the member's options collide with keys of the section.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown section {family!r}: a member can be chosen for {', '.join(FAMILIES)}")
    own = ConfigDict()
    if (family, name) != ("prompts", "auto"):
        try:
            member = find.find(FAMILIES[family], name)
        except InputError as error:
            raise InputError(f"{family}.name: received {name!r}; {error}") from error
        if hasattr(member, "default_config"):
            own = errors.plug_in(f"{family}.name={name}: default_config()", member.default_config)
    shared = [key.rpartition(".")[2] for key in BY_NAME if key.startswith(f"{family}.")]
    section = ConfigDict({key: config[family][key] for key in shared} | {"name": name})
    for key, value in own.items():
        if key in section:
            raise InputError(f"{family}.name: received {name!r}; its option {key!r} is one of every member's")
        section[key] = value
    with config.unlocked():
        config[family] = section
