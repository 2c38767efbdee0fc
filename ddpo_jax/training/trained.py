"""What a run has trained: read from its folder, put into its model."""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models.functional import check_shapes
from ddpo_jax.training.build import Model, load_model
from ddpo_jax.workdir.checkpoint import Checkpointer, Damaged
from ddpo_jax.workdir.folder import read_config

__all__ = ["Epoch", "load_trained", "read_config", "read_params"]

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


def read_params(
    workdir: str | os.PathLike[str], config: ConfigDict, epoch: Epoch = "latest", ema: bool = False
) -> tuple[int, dict[str, np.ndarray]]:
    """``(finished epochs, trained parameters by dotted name)``; with adapters these are the adapters' alone.

    Args: as of ``load_trained``; ``config`` is the run's.
    """
    if ema and not config.train.ema_decay:
        raise InputError("--ema: the run kept no average (train.ema_decay=0); it must be above 0; leave out --ema")
    with Checkpointer(pathlib.Path(workdir).expanduser(), read_only=True) as saver:
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
