"""Writes what a run has trained in the format of diffusers.

A run of the whole UNet becomes a pipeline folder, which PyTorch diffusers, `--config.model=FOLDER` and
`--model=FOLDER` read. A run of adapters becomes one LoRA file, which PyTorch diffusers reads with
`StableDiffusionPipeline.load_lora_weights(FOLDER)`, or, with --format=folder, a pipeline folder in which the adapters
are added to the weights.

example:
  python -m ddpo_jax.export --workdir=runs/aesthetic --out=exported --epoch=best
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import cli
from ddpo_jax.models import lora, pipeline
from ddpo_jax.models.functional import flat_params, put
from ddpo_jax.trained import Epoch, read_config, read_params

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
      ValueError: there is no such run or checkpoint, or ``form`` does not fit what was trained.
    """
    config = read_config(workdir)
    folder = pathlib.Path(out).expanduser()
    rank = config.train.lora_rank
    if form == "lora" and not rank:
        raise ValueError("--format: received 'lora'; the run trained the whole UNet; use --format=folder")
    if folder.is_file():
        raise ValueError(f"--out: received '{out}'; it is a file; give a folder")
    if folder.exists() and folder.resolve() == pathlib.Path(config.model).expanduser().resolve():
        raise ValueError(f"--out: received '{out}'; that is the model the run started from; give another folder")
    number, params = read_params(workdir, config, epoch, ema)
    what = f"epoch {number} of {workdir}" + (", averaged" if ema else "")
    if rank and form != "folder":
        lora.save(folder / LORA_FILE, params)
        layers = len(params) // 2
        return f"{what}: adapters of rank {rank} on {layers} layers of {config.model} -> {folder / LORA_FILE}"
    pipeline.save(trained_pipeline(config, params), folder)
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


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("ddpo_jax.export", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--epoch", default="latest", help="finished epochs of a checkpoint, or latest, or best")
    parser.add_argument("--ema", action="store_true", help="the average of the parameters (train.ema_decay > 0)")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="auto: lora if adapters were trained")
    args = parser.parse_args(argv)
    print(export(args.workdir, args.out, args.epoch, args.ema, args.format))


if __name__ == "__main__":
    sys.exit(cli.run(main))
