"""What a run has trained, in the format of diffusers: a pipeline folder, or a LoRA file."""

from __future__ import annotations

import pathlib

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import lora, pipeline
from ddpo_jax.models.functional import flat_params, put
from ddpo_jax.training.trained import Epoch, read_config, read_params
from ddpo_jax.workdir.files import folder_to_write, writing

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for in a folder
FORMATS = ("auto", "folder", "lora")


def export(workdir: str, out: str, epoch: Epoch = "latest", ema: bool = False, form: str = "auto") -> str:
    """Writes the trained weights of a run below ``out``; returns a line that says what was done.

    Args:
      workdir: folder of the run; it may still be going on.
      out: folder to write; files of the same names are replaced.
      epoch: "latest", "best" or a number of finished epochs.
      ema: take the average of the parameters.
      form: "folder", "lora", or "auto": what was trained.

    Raises:
      InputError: there is no such run or checkpoint, ``form`` does not fit what was trained, or ``out`` cannot be
        written.
      RunFailure: the disk is full.
    """
    config = read_config(workdir)
    rank = config.train.lora_rank
    if form == "lora" and not rank:
        raise InputError("--format: received 'lora'; the run trained the whole UNet; use --format=folder")
    folder = folder_to_write(out, "--out")
    if folder.resolve() == pathlib.Path(config.model).expanduser().resolve():
        raise InputError(f"--out: received '{out}'; that is the model the run started from; give another folder")
    number, params = read_params(workdir, config, epoch, ema)
    what = f"epoch {number} of {workdir}" + (", averaged" if ema else "")
    if rank and form != "folder":
        with writing(folder / LORA_FILE):
            lora.save(folder / LORA_FILE, params)
        layers = len(params) // 2
        return f"{what}: adapters of rank {rank} on {layers} layers of {config.model} -> {folder / LORA_FILE}"
    pipe = trained_pipeline(config, params)
    with writing(folder):
        pipeline.save(pipe, folder)
    return f"{what}: {config.model} with {'merged adapters' if rank else 'its trained UNet'} -> {folder}"


def trained_pipeline(config: ConfigDict, params: dict[str, np.ndarray]) -> pipeline.Pipeline:
    """The pipeline a run started from, in float32, with the run's parameters in its UNet and no adapters.

    Args:
      config: of the run.
      params: the trained parameters by dotted name.
    """
    pipe = pipeline.load(config.model, revision=config.revision or None)
    base = {name: np.asarray(value) for name, value in flat_params(pipe.unet).items()}
    put(pipe.unet, lora.merge(base | params))
    return pipe
