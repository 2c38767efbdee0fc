"""What depends on the model and the machine is filled in, once, before anything is loaded."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.config.defaults import (
    FAMILIES,
    KEYS,
    MAX_MICROBATCH,
    OPEN,
    STABLE_DIFFUSION,
    UPDATES_PER_EPOCH,
    ByModel,
    choose,
    default_config,
)
from ddpo_jax.config.keys import TYPE_NAMES, flatten, get, put
from ddpo_jax.config.members import Members, look_up
from ddpo_jax.config.model import default_clip_range, is_miniature, latent_shape
from ddpo_jax.config.override import declared_type, unknown_key
from ddpo_jax.errors import InputError
from ddpo_jax.types import Traits

MINIATURES_OWN = ("clip_score", "mini_verifier")  # rewards that know the miniature's prompts


def resolve(config: ConfigDict, backend: str, num_devices: int = 1) -> tuple[ConfigDict, Members]:
    """A copy in which everything that depends on the model and the machine is filled in, and its members.

    Args:
      config: left as it is. Keys that are not None are kept.
      backend: ``jax.default_backend()``: "cpu", "gpu" or "tpu".
      num_devices: all devices of the run; the default microbatch divides the images of one of them.

    Raises:
      InputError: a key is unknown or of the wrong type, a member or the model cannot be found.
    """
    config = config.copy_and_resolve_references()
    _check_types(config)
    if config.model == "auto":
        config.model = "mini" if backend == "cpu" else STABLE_DIFFUSION
    mini = is_miniature(config.model)
    if config.prompts.name == "auto":
        choose(config, "prompts", "mini" if mini else "animals")
    members = look_up(config)
    traits = members.traits(config)
    if config.train.timestep_fraction is None and not traits.separable:
        config.train.timestep_fraction = 1.0
    if config.log.evaluate_every is None and not getattr(members.reward, "FREE_TO_ASK", True):
        config.log.evaluate_every = 0
    for key in KEYS:
        if isinstance(key.default, ByModel) and get(config, key.name) is None:
            put(config, key.name, _pick(key.default, mini))
    _fill_member_options(config, members, mini)
    if config.dtype == "auto":
        config.dtype = "float32" if mini or backend == "cpu" else "bfloat16"
    if config.train.remat == "auto":
        config.train.remat = "off" if mini else "on"
    if config.train.recompute_log_prob == "auto":  # bfloat16 rounds differently at the sampler's batch size
        needed = config.dtype == "bfloat16" and "log_prob" in traits.terms
        config.train.recompute_log_prob = "on" if needed else "off"
    if config.train.clip_range is None:
        with contextlib.suppress(InputError):  # of the model, which ``validate`` reports with all other faults
            config.train.clip_range = default_clip_range(math.prod(latent_shape(config.model, config.revision)))
    if config.log.evaluate_also is None:
        worldly = config.model == "mini" and config.prompts.name == "mini"  # prompts that the verifier can read
        config.log.evaluate_also = MINIATURES_OWN if worldly and config.log.evaluate_every else ()
    if config.train.batch_size is None:
        config.train.batch_size = _train_batch_size(config, traits, _pick(UPDATES_PER_EPOCH, mini))
    if config.mesh.data == -1 and backend == "cpu":
        config.mesh.data = _cpu_devices(config, num_devices)
    if config.mesh.data != -1:
        num_devices = config.mesh.data * config.mesh.fsdp
    if config.train.microbatch_size is None:
        images = max(config.train.batch_size // max(num_devices, 1), 1)
        largest = _pick(MAX_MICROBATCH, mini)
        config.train.microbatch_size = max(n for n in range(1, largest + 1) if images % n == 0)
    return config, members


def _pick(default: ByModel, mini: bool) -> Any:
    return default.miniature if mini else default.stable_diffusion


def _check_types(config: ConfigDict) -> None:
    """Refuses keys and types that a config file made up; turns an int into the float that is declared."""
    reference = default_config()
    for family in FAMILIES:
        if family not in config or not isinstance(config[family], ConfigDict) or "name" not in config[family]:
            raise InputError(f"{family}.name: received nothing; start from ddpo_jax.config.default_config()")
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
        elif kind is None or type(value) is kind or (value is None and key in OPEN):
            continue
        elif {kind, type(value)} != {tuple, list}:
            faults.append(
                f"{key}: received {value!r} ({type(value).__name__}); it must be {TYPE_NAMES.get(kind, kind)}"
            )
    if faults:
        raise InputError("\n".join(faults))


def _fill_member_options(config: ConfigDict, members: Members, mini: bool) -> None:
    """Options whose value is "auto" and that the member's ``AUTO`` gives: {option: (the miniature's, any other's)}."""
    for family in FAMILIES:
        section = config[family]
        for option, values in getattr(getattr(members, family), "AUTO", {}).items():
            if section[option] == "auto":
                section[option] = _pick(ByModel(*values), mini)


def other_reward(config: ConfigDict, name: str) -> tuple[ConfigDict, Any]:
    """The ``reward`` section and the member of a reward that is not the run's, with its defaults for the run's model.

    Raises:
      InputError: there is no such reward.
    """
    chosen = default_config()
    choose(chosen, "reward", name)
    member = find.find(FAMILIES["reward"], name)
    for option, values in getattr(member, "AUTO", {}).items():
        chosen.reward[option] = _pick(ByModel(*values), is_miniature(config.model))
    return chosen.reward, member


def _train_batch_size(config: ConfigDict, traits: Traits, updates: int) -> int:
    """An epoch's images over ``updates``; the whole epoch where that does not come out in whole groups of a prompt,
    or where the algorithm has no importance ratio and so may update only once."""
    images, group = config.sample.batch_size * config.sample.num_batches_per_epoch, config.prompts.samples_per_prompt
    once = not traits.importance_ratio
    return images if once or images % updates or images // updates % max(group, 1) else images // updates


def _cpu_devices(config: ConfigDict, num_devices: int) -> int:
    """As many of the CPU's cores as split the batches evenly; -1 where nothing does."""
    train = config.train
    sizes = config.sample.batch_size, train.batch_size, train.batch_size // (train.microbatch_size or 1)
    fsdp = max(config.mesh.fsdp, 1)
    counts = range(num_devices // fsdp, 0, -1)
    return next((n for n in counts if not any(size % (n * fsdp) for size in sizes)), -1)
