"""The configuration: every key, its default and its meaning; named members; overrides; what a resumed run may change.

A key is where it is used: ``sample.*`` shapes the rollout, ``train.*`` the update, and each family of interchangeable
parts (algorithm, weighting, replay, reward, prompts) has a section that holds the ``name`` of the member and the
options of that member alone. ``ddpo_jax.validate`` says which values go together.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.keys import TYPE_NAMES, flatten, get, parse, put, split, unquoted

# Section of the config -> package that holds its members.
FAMILIES = {
    "algorithm": "algorithms",
    "weighting": "weighting",
    "replay": "replay",
    "reward": "rewards",
    "prompts": "prompts",
}
# Keys of a section that belong to the run, not to the member: they survive a change of member.
SHARED = {"replay": ("k", "history"), "prompts": ("samples_per_prompt",)}

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"

# Defaults that depend on the model: key -> (the miniature, Stable Diffusion). They are None until ``resolve``.
BY_MODEL: dict[str, tuple[Any, Any]] = {
    "num_epochs": (90, 100),
    "sample.num_steps": (10, 50),
    "sample.batch_size": (32, 8),
    "sample.num_batches_per_epoch": (4, 32),
    "train.learning_rate": (1.4e-4, 3e-4),
    "train.timestep_fraction": (0.3, 1.0),  # 1 for an algorithm whose loss couples the steps
    "train.lora_rank": (0, 4),
    "checkpoint.every": (5, 1),  # of the miniature one takes as long as a third of an epoch
}
# Of both models too, but computed: an epoch is this many updates, a microbatch at most this many images.
UPDATES_PER_EPOCH = (1, 4)
MAX_MICROBATCH = (32, 2)
COMPUTED = {"train.batch_size": int, "train.microbatch_size": int, "train.clip_range": float}


def default_config() -> ConfigDict:
    """Every key with its default. ``None`` = decided in ``resolve``, by the model; a value that is given stays."""
    config = ConfigDict()
    config.seed = 0  # whole number >= 0; prompts, initial noise, step noise and shuffling all follow from it
    config.num_epochs = None  # epochs: rollout, rewards, update; by model
    config.model = "auto"  # auto = mini on CPU, Stable Diffusion v1.5 on GPU/TPU; mini; a hub id; a diffusers folder
    config.revision = ""  # branch, tag or commit of a hub model; empty = the hub's main branch
    config.dtype = "auto"  # compute type of the networks: float32, bfloat16; auto = bfloat16 for SD on GPU/TPU
    config.frozen_on_host = False  # keep text encoder and VAE in host memory while they do not run
    config.attention = "auto"  # attention kernel: auto, xla, cudnn, chunked, flash_tpu

    config.sample = sample = ConfigDict()  # the rollout
    sample.num_steps = None  # denoising steps T per image; by model
    sample.eta = 1.0  # noise added per DDIM step, in (0, 1]; 1 = DDPM; at 0 a step has no density to train
    sample.guidance_scale = 5.0  # classifier-free guidance w in rollout and update; 1 = no guidance
    sample.batch_size = None  # images sampled at once, over all devices; by model
    sample.num_batches_per_epoch = None  # sampling batches per epoch; by model

    config.train = train = ConfigDict()  # the update
    train.batch_size = None  # images per optimizer update, over all devices; by model (an epoch / its updates)
    train.microbatch_size = None  # images per forward and backward pass on one device; by model
    train.learning_rate = None  # AdamW step size, constant; by model
    train.weight_decay = 1e-4  # AdamW decoupled weight decay
    train.adam_b1 = 0.9  # AdamW decay of the first moment, in [0, 1)
    train.adam_b2 = 0.999  # AdamW decay of the second moment, in [0, 1)
    train.adam_eps = 1e-8  # AdamW denominator offset
    train.max_grad_norm = 1.0  # clip of the gradient's global norm, after averaging over images and steps
    train.num_inner_epochs = 1  # passes over an epoch's images
    train.clip_range = None  # trust region of the per-step ratio; by latent size: 1e-4 * sqrt(16384 / dimensions)
    train.adv_clip_max = 10.0  # advantages are clipped to +- this, in units of the advantage
    train.timestep_fraction = None  # part of the T steps trained per image, in (0, 1], at least one; by model
    train.step_sampling = "importance"  # how they are drawn: in proportion to the weighting, unbiased; or uniform
    train.lora_rank = None  # rank of low-rank adapters on the attention; 0 = train the whole UNet; by model
    train.lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # layers that get an adapter: ends of their names
    train.ema_decay = 0.0  # decay per update of an average of the parameters, in [0, 1); 0 = no average
    train.stop_uncond_gradient = False  # leave the unconditional branch of guidance out of the gradient
    train.remat = "auto"  # recompute activations in the backward pass to save memory: on, off; auto = on for SD
    train.recompute_log_prob = "auto"  # old log-probs by the update's program: on, off; auto = on in bfloat16

    config.algorithm = ConfigDict({"name": "ddpo"})  # scores to coefficients: a file of ddpo_jax/algorithms
    config.weighting = ConfigDict({"name": "uniform"})  # weight of each step: a file of ddpo_jax/weighting

    config.replay = replay = ConfigDict()  # reuse of past rollouts: a file of ddpo_jax/replay
    replay.name = "none"  # rule that picks what is replayed; none = only this epoch
    replay.k = 4  # images replayed per device and epoch, after the ordinary updates
    replay.history = 3  # epochs a rollout stays in the buffer

    config.reward = ConfigDict({"name": "jpeg_compressibility"})  # images to scores: a file of ddpo_jax/rewards

    config.prompts = prompts = ConfigDict()  # what is drawn: a file of ddpo_jax/prompts
    prompts.name = "auto"  # auto = mini for the miniature, animals for SD; or a file's name, or package.module:function
    prompts.samples_per_prompt = 4  # images K of each drawn prompt; group baselines compare these

    config.mesh = mesh = ConfigDict()  # devices
    mesh.data = -1  # devices that split the images only; -1 = all that fsdp leaves (CPU: cores that divide the batches)
    mesh.fsdp = 1  # devices that split the images and also share one copy of the parameters

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = None  # epochs between checkpoints; the last epoch is always saved; by model
    checkpoint.keep = 2  # latest checkpoints kept; the best by reward is kept as well

    config.log = log = ConfigDict()
    log.images_every = 1  # epochs between image grids; 0 = none
    log.num_images = 16  # images in a grid

    for family in FAMILIES:
        choose(config, family, config[family].name)
    config.lock()
    return config


def choose(config: ConfigDict, family: str, name: str) -> None:
    """Sets ``<family>.name`` and gives the section that member's own options, and nothing of the former member's.

    Args:
      config: changed in place.
      family: a section: one of ``FAMILIES``.
      name: a member's name, ``package.module``, or for rewards and prompts ``package.module:function``; for prompts
        also "auto".

    Raises:
      ValueError: no such family or member; or the member's options collide with keys of the section.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown section {family!r}: a member can be chosen for {', '.join(FAMILIES)}")
    own = ConfigDict()
    if (family, name) != ("prompts", "auto"):
        try:
            member = find.find(FAMILIES[family], name)
        except ValueError as error:
            raise ValueError(f"{family}.name: received {name!r}; {error}") from error
        if hasattr(member, "default_config"):
            own = member.default_config()
    section = ConfigDict({"name": name, **{key: config[family][key] for key in SHARED.get(family, ())}})
    for key, value in own.items():
        if key in section:
            raise ValueError(f"{family}.name: received {name!r}; its option {key!r} is one of every member's")
        section[key] = value
    with config.unlocked():
        config[family] = section


def default_clip_range(num_dims: int) -> float:
    """Half-width of the ratio's trust region for ``num_dims`` latent dimensions, on log-probs averaged over them.

    1e-4 is the usual value at 64*64*4 = 16384 dimensions; the noise of the mean scales as 1/sqrt(dimensions).
    """
    return 1e-4 * math.sqrt(16384 / num_dims)


def is_miniature(model: str) -> bool:
    """Whether ``model`` is the embedded miniature, or a diffusers folder of its size (latents of at most 16 x 16)."""
    if model == "mini":
        return True
    unet = pathlib.Path(model).expanduser() / "unet" / "config.json"
    if not unet.is_file():
        return False
    try:
        return int(json.loads(unet.read_text(encoding="utf-8"))["sample_size"]) <= 16
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: received {model!r}; {unet} must be JSON with a whole number 'sample_size'; export the model again"
        ) from error


def resolve(config: ConfigDict, backend: str, num_devices: int = 1) -> ConfigDict:
    """A copy in which everything that depends on the model and the machine is filled in, except ``train.clip_range``.

    Args:
      config: left as it is. Keys that are not None are kept.
      backend: ``jax.default_backend()``: "cpu", "gpu" or "tpu".
      num_devices: all devices of the run; the default microbatch divides the images of one of them.
    """
    config = config.copy_and_resolve_references()
    _check_types(config)
    if config.model == "auto":
        config.model = "mini" if backend == "cpu" else STABLE_DIFFUSION
    mini = is_miniature(config.model)
    column = 0 if mini else 1
    if config.train.timestep_fraction is None and not traits(config).separable:
        config.train.timestep_fraction = 1.0
    for key, values in BY_MODEL.items():
        if get(config, key) is None:
            put(config, key, values[column])
    if config.prompts.name == "auto":
        choose(config, "prompts", "mini" if mini else "animals")
    _fill_member_options(config, column)
    if config.dtype == "auto":
        config.dtype = "float32" if mini or backend == "cpu" else "bfloat16"
    if config.train.remat == "auto":
        config.train.remat = "off" if mini else "on"
    if config.train.recompute_log_prob == "auto":  # bfloat16 rounds differently at the sampler's batch size
        config.train.recompute_log_prob = "on" if config.dtype == "bfloat16" else "off"
    if config.train.batch_size is None:
        config.train.batch_size = _train_batch_size(config, UPDATES_PER_EPOCH[column])
    if config.mesh.data == -1 and backend == "cpu":
        config.mesh.data = _cpu_devices(config, num_devices)
    if config.mesh.data != -1:
        num_devices = config.mesh.data * config.mesh.fsdp
    if config.train.microbatch_size is None:
        images = max(config.train.batch_size // max(num_devices, 1), 1)
        config.train.microbatch_size = max(n for n in range(1, MAX_MICROBATCH[column] + 1) if images % n == 0)
    return config


def _check_types(config: ConfigDict) -> None:
    """Refuses keys and types that a config file made up; turns an int into the float that is declared."""
    reference = default_config()
    for family in FAMILIES:
        choose(reference, family, config[family].name)
    given, known = flatten(config), flatten(reference)
    faults = [
        f"{key}: received nothing; start from ddpo_jax.config.default_config()" for key in known if key not in given
    ]
    for key, value in given.items():
        if key not in known:
            faults.append(unknown_key(reference, key, list(known)))
            continue
        kind = declared_type(reference, key)
        if kind is float and type(value) is int:
            with config.ignore_type():  # an int took the place of None
                put(config, key, float(value))
        elif kind is None or type(value) is kind or (value is None and (key in BY_MODEL or key in COMPUTED)):
            continue
        elif {kind, type(value)} != {tuple, list}:
            faults.append(
                f"{key}: received {value!r} ({type(value).__name__}); it must be {TYPE_NAMES.get(kind, kind)}"
            )
    if faults:
        raise ValueError("\n".join(faults))


def _fill_member_options(config: ConfigDict, column: int) -> None:
    """Options whose value is "auto" and that the member's ``AUTO`` gives: {option: (the miniature's, any other's)}."""
    for family, package in FAMILIES.items():
        section = config[family]
        for option, values in getattr(find.find(package, section.name), "AUTO", {}).items():
            if section[option] == "auto":
                section[option] = values[column]


def _train_batch_size(config: ConfigDict, updates: int) -> int:
    """An epoch's images over ``updates``; the whole epoch where that does not come out in whole groups of a prompt,
    or where the algorithm has no importance ratio and so may update only once."""
    images, group = config.sample.batch_size * config.sample.num_batches_per_epoch, config.prompts.samples_per_prompt
    once = not traits(config).importance_ratio
    return images if once or images % updates or images // updates % max(group, 1) else images // updates


def _cpu_devices(config: ConfigDict, num_devices: int) -> int:
    """As many of the CPU's cores as split the batches evenly; -1 where nothing does."""
    train = config.train
    sizes = config.sample.batch_size, train.batch_size, train.batch_size // (train.microbatch_size or 1)
    fsdp = max(config.mesh.fsdp, 1)
    counts = range(num_devices // fsdp, 0, -1)
    return next((n for n in counts if not any(size % (n * fsdp) for size in sizes)), -1)


def traits(config: ConfigDict) -> Any:
    """``types.Traits`` of the chosen algorithm."""
    return find.find("algorithms", config.algorithm.name).traits(config.algorithm)


def with_choices(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies a config file's argument, such as ``algorithm=loop,train.learning_rate=1e-4``, and returns ``config``.

    A section's bare name stands for its ``name`` key. Commas inside brackets or quotes do not separate.

    Raises:
      ValueError: one line for each fault.
    """
    pairs, faults = [], []
    for item in split(arg):
        key, equals, value = item.partition("=")
        if not equals:
            faults.append(f"config argument: received {item!r}; it must be key=value, such as algorithm=loop")
            continue
        key = key.strip()
        pairs.append((f"{key}.name" if key in FAMILIES else key, unquoted(value.strip())))
    if faults:
        raise ValueError("\n".join(faults))
    override(config, pairs)
    return config


def override(config: ConfigDict, pairs: Iterable[tuple[str, str]]) -> None:
    """Sets keys from text, in place: members first, since they bring keys of their own; then the rest in order.

    Args:
      config: changed in place.
      pairs: (key, text), such as ("train.learning_rate", "1e-4").

    Raises:
      ValueError: one line for each unknown key and each value of the wrong type.
    """
    names = [f"{family}.name" for family in FAMILIES]
    pairs, faults = list(pairs), []
    for key, text in sorted(pairs, key=lambda pair: pair[0] not in names):
        try:
            if key in names:
                choose(config, key.removesuffix(".name"), text)
            elif key not in (known := flatten(config)):
                raise ValueError(unknown_key(config, key, list(known)))
            else:
                put(config, key, _value(config, key, text))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))


def unknown_key(config: ConfigDict, key: str, known: list[str]) -> str:
    """One line that says what was probably meant by a key that does not exist."""
    section, _, option = key.partition(".")
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        return f"unknown key {key!r}: it is a section; its keys are {', '.join(inside)}"
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    last = key.rpartition(".")[2]
    near = (
        by_last_part.get(last)
        or find.nearest(key, known)
        or by_last_part.get(find.nearest(last, [*by_last_part]) or "")
    )
    line = f"unknown key {key!r}: " + (f"nearest is {near!r}" if near else f"keys are {', '.join(known)}")
    if section not in FAMILIES or not option:
        return line
    name, own = config[section].name, [k for k in known if k.startswith(section + ".")]
    if name == "auto":
        return f"unknown key {key!r}: {section}.name is 'auto', which has no options; set {section}.name too"
    return f"{line}; {section}.name is {name!r}, whose keys are {', '.join(own)}"


def declared_type(config: ConfigDict, key: str) -> type | None:
    """The type a key's value must have, or None where a member leaves it open (its default is None)."""
    if key in BY_MODEL:
        return type(BY_MODEL[key][0])
    if key in COMPUTED:
        return COMPUTED[key]
    section, _, last = key.rpartition(".")
    kind = (get(config, section) if section else config).get_type(last)
    return None if kind is type(None) else kind


def _value(config: ConfigDict, key: str, text: str) -> Any:
    if text.lower() == "none" and (key in BY_MODEL or key in COMPUTED):
        return None
    kind, default = declared_type(config, key), get(config, key)
    elements = type(default[0]) if isinstance(default, tuple | list) and default else None
    try:
        return parse(text, kind, elements)
    except ValueError:
        rule = TYPE_NAMES.get(kind, "a value")
        example = next(value for value in (default, BY_MODEL.get(key, (None,))[0], 1) if value is not None)
        raise ValueError(f"{key}: received {text!r}; it must be {rule}; write for example {key}={example}") from None


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, ended by a newline; tuples become lists."""
    return json.dumps(config.copy_and_resolve_references().to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that ``to_json`` wrote, locked.

    Raises:
      ValueError: the text is not a JSON object.
    """

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json: line {error.lineno}: {error.msg}; restore it or use another folder") from None
    if not isinstance(data, dict):
        raise ValueError(f"config.json: received {type(data).__name__}; it must be a JSON object")
    return ConfigDict(restore(data)).lock()
