"""Writes what a run has trained in the format of diffusers.

A run of the whole UNet becomes a pipeline folder, which PyTorch diffusers, `--config.model=FOLDER` and
`--model=FOLDER` read. A run of adapters becomes one LoRA file, which PyTorch diffusers reads with
`StableDiffusionPipeline.load_lora_weights(FOLDER)`, or, with --format=folder, a pipeline folder in which the adapters
are added to the weights.

example:
  ddpo_jax export --workdir=runs/aesthetic --out=exported --epoch=best
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.training.export import FORMATS, export


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("export", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--epoch", default="latest", help="finished epochs of a checkpoint, or latest, or best")
    parser.add_argument("--ema", action="store_true", help="the average of the parameters (train.ema_decay > 0)")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="auto: lora if adapters were trained")
    args = parser.parse_args(argv)
    print(export(args.workdir, args.out, args.epoch, args.ema, args.format))
