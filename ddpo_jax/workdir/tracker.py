"""Weights & Biases: a run's rows and pictures as they are written, beside TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

from ddpo_jax.config.keys import flatten
from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError, one_line
from ddpo_jax.workdir import files

FILE = "wandb.json"  # in a run's folder: by project, the id of the run there
# Numbers of what is sent: pictures of the fixed prompts, the row, the samples. A run that is resumed, offline too, goes
# on counting where it was; what it repeats after a kill is the same as before, and the package drops it.
_ORDER = ("fixed_prompts", "row", "samples")
_ID = re.compile(r"[\w-]{1,64}")


class Tracker:
    """A run of a project; what is sent has the epoch as its horizontal axis.

    A fault of the package in mid-run is told once, and the run goes on without it.

    Args:
      folder: of the run; its name is the run's name there, and what is not uploaded yet is kept below it.
      project: ``log.wandb``.
      config: of the run; tokens stay here.

    Raises:
      InputError: the package cannot be started, such as without an account.
    """

    def __init__(self, folder: pathlib.Path, project: str, config: ConfigDict):
        wandb = importlib.import_module("wandb")
        number, sent = _run_id(folder, project), flatten(config)
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                id=number,
                resume="allow",
                dir=str(folder),
                config={key: value for key, value in sent.items() if key.rpartition(".")[2] != "token"},
                settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
            )
            self._run.define_metric("*", step_metric="epoch")
        except Exception as error:  # the package raises many unrelated types
            raise InputError(
                f"log.wandb: received {project!r}; wandb does not start: {one_line(error)[:300]}; run wandb login, set "
                "WANDB_MODE=offline, or leave log.wandb empty"
            ) from error
        self._image = wandb.Image
        logging.info("Weights & Biases: run %s of project %s, %s", number, project, self._run.url or "offline")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers by name."""
        self._log(step, "row", values)

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Sends a picture, "samples" or "fixed_prompts"."""
        self._log(step, name, {name: self._image(pixels)})

    def close(self) -> None:
        """Waits until everything is sent."""
        with self._told():
            if self._run is not None:
                self._run.finish()

    def _log(self, epoch: int, kind: str, entry: Mapping[str, Any]) -> None:
        with self._told():
            if self._run is not None:
                number = len(_ORDER) * epoch + _ORDER.index(kind)
                self._run.log({"epoch": epoch, **entry}, step=number, commit=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # training is worth more than its log
            self._run = None
            logging.warning("Weights & Biases: %s; the run goes on without it", one_line(error))


def _run_id(folder: pathlib.Path, project: str) -> str:
    """The id that the folder keeps for a project, so that a resumed run goes on in the same one; a new one at first.

    Raises:
      InputError: the file that keeps it is damaged.
    """
    path = folder / FILE
    known = read_json(path) if path.exists() else {}
    number = known.setdefault(project, secrets.token_hex(4))
    if not (isinstance(number, str) and _ID.fullmatch(number)):
        raise InputError(f"{path} {project}: received {number!r:.80}; it must be the id of a run; remove the file")
    files.write_json(path, known)
    return number
