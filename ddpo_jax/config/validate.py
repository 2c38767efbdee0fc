"""Which values of a config go together: every fault at once, each as one line ``key: received X; rule; fix``."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import errors
from ddpo_jax.config.keys import get
from ddpo_jax.config.members import Members
from ddpo_jax.config.model import is_miniature, latent_shape
from ddpo_jax.errors import InputError
from ddpo_jax.types import Traits

Rule = tuple[Callable[[Any], bool], str, str]  # (holds, the rule in words, a value that satisfies it)


def _at_least(low: int, fix: str | None = None) -> Rule:
    return lambda value: value >= low, f"it must be at least {low}", fix or f"use {low} or more"


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"it must be one of {', '.join(names)}", f"use {names[0]}"


def _positive(fix: str) -> Rule:
    return lambda value: 0 < value < math.inf, "it must be a finite number above 0", f"use {fix}"


def _decay(fix: str) -> Rule:
    return lambda value: 0 <= value < 1, "it must be in [0, 1)", f"use {fix}"


def _rises(text: str) -> bool:
    first, end = map(int, text.split(":"))
    return first < end


_BATCH = (lambda value: 1 <= value <= 2**20, "it must be from 1 to 1048576", "use 8")
_SWITCH = _one_of("auto", "on", "off")
_FINITE_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "it must be a finite number, 0 or more", "use 5.0")

RULES: dict[str, Rule] = {
    "seed": (lambda value: 0 <= value < 2**31, "it must be from 0 to 2147483647", "use 0"),
    "num_epochs": _at_least(1),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "attention": _one_of("auto", "xla", "cudnn", "chunked", "flash_tpu"),
    "sample.num_steps": (
        lambda value: 1 <= value <= 1000,
        "it must be from 1 to the 1000 training timesteps",
        "use 50",
    ),
    "sample.guidance_scale": _FINITE_NOT_NEGATIVE,
    "sample.batch_size": _BATCH,
    "sample.num_batches_per_epoch": _BATCH,
    "train.batch_size": _BATCH,
    "train.microbatch_size": _BATCH,
    "train.learning_rate": _positive("1e-4"),
    "train.weight_decay": (_FINITE_NOT_NEGATIVE[0], _FINITE_NOT_NEGATIVE[1], "use 1e-4"),
    "train.adam_b1": _decay("0.9"),
    "train.adam_b2": _decay("0.999"),
    "train.adam_eps": _positive("1e-8"),
    "train.max_grad_norm": _positive("1.0"),
    "train.num_inner_epochs": _at_least(1),
    "train.clip_range": (lambda value: value is None or 0 < value < math.inf, "it must be above 0", "leave it out"),
    "train.adv_clip_max": (lambda value: value > 0, "it must be above 0", "use 10.0"),
    "train.timestep_fraction": (lambda value: 0 < value <= 1, "it must be in (0, 1]", "use 0.3"),
    "train.step_sampling": _one_of("uniform", "importance"),
    "train.lora_rank": _at_least(0, "use 0 to train the whole UNet, 4 for adapters"),
    "train.ema_decay": _decay("0.0"),
    "train.remat": _SWITCH,
    "train.recompute_log_prob": _SWITCH,
    "replay.k": _at_least(1, "use 4, or replay.name=none for no replay"),
    "replay.history": _at_least(1, "use 3, or replay.name=none for no replay"),
    "reward.wait_s": _positive("600"),
    "replay.max_gib": _positive("16"),
    "replay.updates": _one_of("one", "ordinary"),
    "prompts.samples_per_prompt": _BATCH,
    "mesh.data": (lambda value: value == -1 or value >= 1, "it must be -1 (all devices) or at least 1", "use -1"),
    "mesh.fsdp": _at_least(1),
    "checkpoint.every": _at_least(1),
    "checkpoint.keep": _at_least(1),
    "checkpoint.folder": (
        lambda value: bool(re.fullmatch(r"(~?/.*|gs://[\w.-]+(/[\w.=+-]+)+/?)?", value)),
        "it must be an absolute path or gs://BUCKET/FOLDER, with letters, digits and .-_=+ in it, or empty",
        "leave it out for --workdir",
    ),
    "log.images_every": _at_least(0, "use 0 for no images"),
    "log.evaluate_every": _at_least(0, "use 0 for no evaluation"),
    "log.evaluate_images": (lambda value: 4 <= value <= 2**20, "it must be from 4 to 1048576", "use 128"),
    "log.num_images": _at_least(1, "use 16, or log.images_every=0 for no images"),
    "log.profile": (
        lambda value: not value or bool(re.fullmatch(r"\d{1,9}:\d{1,9}", value)) and _rises(value),
        "it must be FIRST:END, whole numbers of epochs of which END is larger and not traced, or empty",
        "use 2:4",
    ),
    "log.stall_s": _positive("900"),
}


def validate(config: ConfigDict, members: Members, num_devices: int) -> None:
    """Refuses a config that cannot be trained.

    Args:
      config, members: as ``resolve`` returns them.
      num_devices: all devices of the run, over all processes.

    Raises:
      InputError: one line for each fault.
    """
    faults = []
    for key, (holds, rule, fix) in RULES.items():
        if not holds(value := get(config, key)):
            faults.append(f"{key}: received {value!r}; {rule}; {fix}")
    if not 0 < config.sample.eta <= 1:
        why = "a step without noise has no density, so there is nothing to train; " if config.sample.eta == 0 else ""
        faults.append(f"sample.eta: received {config.sample.eta!r}; {why}it must be in (0, 1]; use 1.0")
    broken = {fault.partition(":")[0] for fault in faults}
    if not broken & {"sample.batch_size", "sample.num_batches_per_epoch", "train.batch_size", "train.microbatch_size",
                     "prompts.samples_per_prompt", "mesh.data", "mesh.fsdp"}:  # fmt: skip
        faults += _sizes(config, num_devices)
    traits = members.traits(config)
    faults += _algorithm(config, traits)
    if not broken & {"sample.num_steps"}:
        faults += _weighting(config, members)
    if not broken & {"sample.batch_size", "sample.num_batches_per_epoch", "prompts.samples_per_prompt",
                     "replay.k", "replay.history"}:  # fmt: skip
        faults += _replay(config, members, traits, _used(config, num_devices))
    try:
        latents = latent_shape(config.model, config.revision)
    except InputError as error:
        faults.append(str(error))
    else:
        if not broken & {"sample.num_steps", "sample.batch_size", "sample.num_batches_per_epoch"}:
            faults += _memory(config, latents)
        faults += _reward(config, members)
    faults += _tracker(config)
    if faults:
        raise InputError("\n".join(faults))


def _sizes(config: ConfigDict, num_devices: int) -> Iterator[str]:
    sample, train, group = config.sample, config.train, config.prompts.samples_per_prompt
    images = sample.batch_size * sample.num_batches_per_epoch
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if data == -1 and num_devices % fsdp:
        yield f"mesh.fsdp: received {fsdp}; it must divide the {num_devices} devices; use {_near(num_devices, fsdp)}"
    if data != -1 and data * fsdp > num_devices:
        yield (
            f"mesh.data: received {data}; data x fsdp = {data} x {fsdp} must be at most the {num_devices} devices "
            "there are; use mesh.data=-1"
        )
    num_devices = _used(config, num_devices)
    if sample.batch_size % group:
        yield (
            f"prompts.samples_per_prompt: received {group}; it must divide sample.batch_size={sample.batch_size}; "
            f"use {_near(sample.batch_size, group)}"
        )
    for key, size in (("sample.batch_size", sample.batch_size), ("train.batch_size", train.batch_size)):
        if size % num_devices:
            yield (
                f"{key}: received {size}; each of the {num_devices} devices takes an equal part; "
                f"use {_multiple(size, num_devices)}"
            )
    if images % train.batch_size:
        yield (
            f"train.batch_size: received {train.batch_size}; it must divide an epoch's images, sample.batch_size x "
            f"sample.num_batches_per_epoch = {sample.batch_size} x {sample.num_batches_per_epoch} = {images}; "
            f"use {_near(images, train.batch_size)}"
        )
    per_device = train.batch_size // num_devices
    if train.batch_size % num_devices == 0 and per_device % train.microbatch_size:
        yield (
            f"train.microbatch_size: received {train.microbatch_size}; it must divide the {per_device} images of an "
            f"update on one device; use {_near(per_device, train.microbatch_size)}"
        )


def _algorithm(config: ConfigDict, used: Traits) -> Iterator[str]:
    name, group = config.algorithm.name, config.prompts.samples_per_prompt
    train = config.train
    if used.group and group < 2:
        yield (
            f"prompts.samples_per_prompt: received {group}; algorithm {name!r} compares the images of a prompt with "
            "each other, which takes at least 2; use 4"
        )
    elif used.group and train.batch_size % group:
        yield (
            f"train.batch_size: received {train.batch_size}; algorithm {name!r} needs whole groups of "
            f"prompts.samples_per_prompt={group} images in an update; use {_multiple(train.batch_size, group)}"
        )
    if not used.importance_ratio and config.replay.name != "none":
        yield (
            f"replay.name: received {config.replay.name!r}; {_current_policy_only(config)}; use replay.name=none or "
            "algorithm.name=ddpo"
        )
    if not used.separable and train.timestep_fraction != 1:
        yield (
            f"train.timestep_fraction: received {train.timestep_fraction!r}; the loss of algorithm {name!r} couples "
            "all steps of a trajectory; use train.timestep_fraction=1.0"
        )
    if train.recompute_log_prob == "on" and "log_prob" not in used.terms:
        yield (
            f"train.recompute_log_prob: received 'on'; algorithm {name!r} reads no log-probs; "
            "use train.recompute_log_prob=auto"
        )


def doubts(config: ConfigDict, used: Traits) -> Iterator[str]:
    """What may be trained but is seldom meant: a line for each, ``key: received X; what it does; what is usual``.

    Args:
      config: valid.
      used: the algorithm's traits.
    """
    train, sample = config.train, config.sample
    images = sample.batch_size * sample.num_batches_per_epoch
    yield from used.doubts
    if used.importance_ratio:
        return
    if train.num_inner_epochs > 1:
        yield (
            f"train.num_inner_epochs: received {train.num_inner_epochs}; {_current_policy_only(config)}, and from the "
            "second update on these are not; train.num_inner_epochs=1 or algorithm.name=ddpo is usual"
        )
    if train.batch_size < images:
        yield (
            f"train.batch_size: received {train.batch_size}; {_current_policy_only(config)}, and from the second "
            f"update on these are not; train.batch_size={images} (an epoch) or algorithm.name=ddpo is usual"
        )


def _current_policy_only(config: ConfigDict) -> str:
    name = config.algorithm.name
    return f"algorithm {name!r} has no importance ratio, so it is right only for images of the current policy"


def _weighting(config: ConfigDict, members: Members) -> Iterator[str]:
    check = getattr(members.weighting, "check", None)
    if check is not None:
        try:
            errors.plug_in(f"weighting.name={config.weighting.name}: check()", check, config.weighting,
                           config.sample.num_steps)  # fmt: skip
        except InputError as error:
            yield str(error)


def _replay(config: ConfigDict, members: Members, traits: Traits, num_devices: int) -> Iterator[str]:
    source = getattr(members.replay, "SOURCE", None)
    if source == "nothing":
        return
    k, group = config.replay.k, config.prompts.samples_per_prompt
    wanted = f"{k} x {num_devices} devices = {k * num_devices} images" if num_devices > 1 else f"{k} images"
    images = config.sample.batch_size * config.sample.num_batches_per_epoch
    there = images * (config.replay.history if source == "past" else 1)
    if k * num_devices > there:
        yield (
            f"replay.k: received {k}; {wanted} are more than the {there} that replay {config.replay.name!r} chooses "
            f"from; use {max(there // num_devices, 1)} or fewer"
        )
    if traits.whole_groups and k * num_devices % group:
        unit = group // math.gcd(group, num_devices)
        yield (
            f"replay.k: received {k}; algorithm {config.algorithm.name!r} needs whole groups of "
            f"prompts.samples_per_prompt={group} images, and {wanted} do not come out in such; use {_multiple(k, unit)}"
        )


def _reward(config: ConfigDict, members: Members) -> Iterator[str]:
    if getattr(members.reward, "MINIATURE_ONLY", False) and not is_miniature(config.model):
        yield (
            f"reward.name: received {config.reward.name!r}; it scores pictures of the miniature's world, which model="
            f"{config.model!r} does not draw; use model=mini or another reward"
        )


def _tracker(config: ConfigDict) -> Iterator[str]:
    """Not a rule of the key alone: a run that was tracked is read on machines without the package."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        yield (
            f"log.wandb: received {config.log.wandb!r}; it needs the package wandb, which is not installed; "
            "pip install 'ddpo_jax[wandb]', or leave it empty"
        )


def _memory(config: ConfigDict, latents: tuple[int, int, int]) -> Iterator[str]:
    """The latents of an epoch, of what replay keeps, and of the images stay in this host's memory."""
    (h, w, c), sample = latents, config.sample
    images = sample.batch_size * sample.num_batches_per_epoch
    kept = images * (1 + (config.replay.history if config.replay.name != "none" else 0))
    wanted = kept * (sample.num_steps + 1) * h * w * c * 4 + images * (8 * h * 8 * w * 3)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if wanted > there:
        yield (
            f"sample.batch_size: received {sample.batch_size}; with sample.num_batches_per_epoch="
            f"{sample.num_batches_per_epoch} an epoch of {images} images of {sample.num_steps} steps takes "
            f"{wanted / 2**30:.3g} GiB of host memory, and there are {there / 2**30:.3g}; use a smaller epoch"
        )


def _used(config: ConfigDict, num_devices: int) -> int:
    """The devices of the mesh; all there are where it asks for more, which ``_sizes`` reports."""
    return num_devices if config.mesh.data == -1 else min(config.mesh.data * config.mesh.fsdp, num_devices)


def _near(number: int, wanted: int) -> int:
    """The divisor of ``number`` nearest to ``wanted``; found in the square root of ``number`` steps."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return min({*small, *(number // n for n in small)}, key=lambda n: (abs(n - wanted), n))


def _multiple(number: int, of: int) -> int:
    """The positive multiple of ``of`` nearest to ``number``."""
    return max(round(number / of), 1) * of
