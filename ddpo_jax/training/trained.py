"""What a run has trained: read from its folder, put into its model; and the images of such a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.config import default_config
from ddpo_jax.config.resolve import resolve
from ddpo_jax.errors import InputError
from ddpo_jax.models import lora
from ddpo_jax.models.functional import check_shapes
from ddpo_jax.training.build import Model, load_model, make_sampler
from ddpo_jax.types import Params
from ddpo_jax.workdir import elsewhere
from ddpo_jax.workdir.checkpoint import Checkpointer, Damaged
from ddpo_jax.workdir.folder import read_config

__all__ = ["Epoch", "draw", "load_base", "load_trained", "read_config", "read_params"]

Epoch = int | str  # finished epochs of a checkpoint, or "latest", or "best" (by mean reward)


def load_trained(
    workdir: str | os.PathLike[str], epoch: Epoch = "latest", ema: bool = False, dtype: str | None = None
) -> tuple[ConfigDict, Model]:
    """The config of a run and its model with the trained parameters.

    The run may still be going on; nothing is written. ``Model.reference`` stays the model before training.

    Args:
      workdir: folder of the run.
      epoch: "latest", "best", or the number of finished epochs after which the checkpoint was saved.
      ema: take the average of the parameters.
      dtype: compute type of the networks; None takes the run's.

    Raises:
      InputError: no run, no such checkpoint, no average, or the model is not the one that was trained.
    """
    config = read_config(workdir)
    _, params = read_params(workdir, config, epoch, ema)
    if dtype is not None:
        config = ConfigDict(config)
        config.dtype = dtype
    model = load_model(config)
    shapes = [{name: value.shape for name, value in tree.items()} for tree in (model.params, params)]
    check_shapes(*shapes)
    model.params = {name: jnp.asarray(params[name]) for name in model.params}
    return config, model


def load_base(model: str, lora_file: str, backend: str, num_devices: int) -> tuple[ConfigDict, Model]:
    """The config of a run on a model, and the model without training.

    Args:
      model: mini, a diffusers folder or a hub id.
      lora_file: adapters to merge into its UNet; "" is none.
      backend, num_devices: as of ``config.resolve``.

    Raises:
      InputError: there is no such model, or the file cannot be read or is of another network.
    """
    config = default_config()
    config.model = model
    config.train.lora_rank = 0
    config, _ = resolve(config, backend, num_devices)
    adapters = _read_adapters(lora_file) if lora_file else {}  # first: a wrong file shows before the model is loaded
    loaded = load_model(config)
    if lora_file:
        loaded.params = _adapted(loaded.params, adapters, lora_file)
    return config, loaded


def _read_adapters(path: str) -> dict[str, np.ndarray]:
    try:
        return lora.load(path)
    except InputError as error:  # of one line or more, each of which names the file
        raise InputError("\n".join(f"--lora: {line}" for line in str(error).splitlines())) from error


def _adapted(params: Params, adapters: dict[str, np.ndarray], path: str) -> Params:
    """A network's parameters with the adapters of a file merged into them."""
    base = {name: np.asarray(value) for name, value in params.items()}
    for layer in sorted({name.rpartition(".")[0] for name in adapters}):
        wanted = adapters[f"{layer}.{lora.DOWN}"].shape[0], adapters[f"{layer}.{lora.UP}"].shape[1]
        kernel = base.get(f"{layer}.kernel")
        if kernel is None or kernel.shape != wanted:
            raise InputError(
                f"--lora: received '{path}'; it adapts {layer} of shape {wanted}, which the model has as "
                f"{None if kernel is None else kernel.shape}; use the --model that the adapters were trained on"
            )
    return jax.device_put(lora.merge(base | adapters))


def draw(
    model: Model, config: ConfigDict, prompts: Sequence[str], num_images: int, seed: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """``num_images`` of each prompt, those of a prompt next to each other, on one device.

    Args:
      model: networks and parameters.
      config: its ``sample`` section says how: ``num_steps``, ``guidance_scale``, ``eta``, ``batch_size``.
      prompts: texts.
      num_images: of each prompt.
      seed: of the initial noise and the noise of the steps, which image k of every prompt shares.
    """
    sampler = make_sampler(model, config, sharding.make_mesh(1, 1))
    names = [prompt for prompt in prompts for _ in range(num_images)]
    numbers = np.tile(np.arange(num_images), len(prompts))
    size = min(len(names), config.sample.batch_size)
    params = sharding.put_params(model.params, sampler.mesh)
    return sampler.images(params, names, numbers, jax.random.key(seed), size)


def read_params(
    workdir: str | os.PathLike[str], config: ConfigDict, epoch: Epoch = "latest", ema: bool = False
) -> tuple[int, dict[str, np.ndarray]]:
    """``(finished epochs, trained parameters by dotted name)``; with adapters these are the adapters' alone.

    Args: as of ``load_trained``; ``config`` is the run's.
    """
    if ema and not config.train.ema_decay:
        raise InputError("--ema: the run kept no average (train.ema_decay=0); it must be above 0; leave out --ema")
    with Checkpointer(elsewhere.home(config, workdir), read_only=True) as saver:
        numbers, damaged = _numbers(saver, epoch), []
        for number in numbers:
            try:
                params = saver.read(number, "state/ema" if ema else "state/params")
            except Damaged as error:
                damaged.append(str(error))
                continue
            for fault in damaged:
                logging.warning("%s; epoch %d is taken", fault, number)
            return number, params
    raise InputError("\n".join(damaged))


def _numbers(saver: Checkpointer, epoch: Epoch) -> list[int]:
    """The checkpoints that ``epoch`` may mean, the first that can be read first."""
    there = saver.epochs()
    if not there:
        raise InputError(f"checkpoints: {saver.folder} holds none yet; wait for the first epoch of the run")
    best = saver.best_epoch()
    if epoch == "latest" or (epoch == "best" and best is None):
        return there[::-1]
    if epoch == "best":
        return [int(best or 0)]
    if str(epoch).isdecimal() and int(epoch) in there:
        return [int(epoch)]
    numbers = ", ".join(map(str, there))
    raise InputError(f"--epoch: received {epoch!r}; saved in {saver.folder} are {numbers}; use one, latest or best")
