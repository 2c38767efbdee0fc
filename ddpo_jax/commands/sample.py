"""Draws images of prompts with a base model or with what a run has trained, as one captioned picture.

Steps, guidance and eta are those of the run (of a base model: the defaults of a run on it), because rewards are
measured on images drawn so and base and trained images then compare like for like. --eta=0 is the deterministic
DDIM that PyTorch diffusers runs by default. Image k of every prompt starts from the same noise, which --seed gives.

examples:
  ddpo_jax sample --model=mini --prompt="a red circle" --prompt="two blue stars" --out=base.png
  ddpo_jax sample --workdir=runs/aesthetic --epoch=best --prompt="a red circle" --out=trained.png
  ddpo_jax sample --model=FOLDER --lora=pytorch_lora_weights.safetensors --prompt="a cat" --out=lora.png
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict
from PIL import Image

from ddpo_jax.commands import _cli as cli
from ddpo_jax.errors import InputError
from ddpo_jax.training.trained import draw, load_base, load_trained
from ddpo_jax.workdir import files, grid

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that do not go together."""
    if bool(args.model) == bool(args.workdir):
        given = "both" if args.model else "neither"
        raise InputError(f"--model, --workdir: received {given}; one says what to sample; use --model=mini")
    if args.lora and args.workdir:
        raise InputError("--lora: received with --workdir, whose adapters are taken from its checkpoint; use --model")
    if not args.workdir and (args.ema or args.epoch != "latest"):
        raise InputError("--epoch, --ema: received without --workdir; they pick a checkpoint of a run; add --workdir")
    if pathlib.Path(args.out).suffix.lower() not in SUFFIXES:
        raise InputError(f"--out: received '{args.out}'; it must end in {', '.join(SUFFIXES)}; use grid.png")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise InputError(f"--eta: received {args.eta}; it must be in [0, 1]; use 0 for deterministic DDIM")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise InputError(f"--guidance: received {args.guidance}; it must be a finite number, 0 or more; use 5")
    cli.file_to_write(args.out, "--out")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("sample", __doc__)
    parser.add_argument("--model", default="", help="mini, a diffusers folder or a hub id: without training")
    parser.add_argument("--lora", default="", metavar="FILE", help="adapters for --model, a file of PEFT")
    parser.add_argument("--workdir", default="", help="folder of a run: what it has trained")
    parser.add_argument("--epoch", default="latest", help="finished epochs of a checkpoint, or latest, or best")
    parser.add_argument("--ema", action="store_true", help="the average of the parameters (train.ema_decay > 0)")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--num-images", type=cli.positive, default=4, help="images of each prompt; 4")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of all noise; 0")
    parser.add_argument("--steps", type=cli.positive, default=None, help="denoising steps; the run's")
    parser.add_argument("--guidance", type=float, default=None, help="scale of classifier-free guidance; the run's")
    parser.add_argument("--eta", type=float, default=None, help="noise of the steps, 0 to 1; the run's")
    parser.add_argument("--out", required=True, help="picture to write, such as grid.png")
    args = parser.parse_args(argv)
    check(args)
    backend, devices = cli.start_jax()
    if args.workdir:
        config, model = load_trained(args.workdir, args.epoch, args.ema)
        name = f"{config.model} trained in {args.workdir} (epoch {args.epoch})"
    else:
        config, model = load_base(args.model, args.lora, backend, devices)
        name = f"{config.model} with {args.lora}" if args.lora else config.model
    config = ConfigDict(config)
    options = config.sample
    for key, value in (("num_steps", args.steps), ("guidance_scale", args.guidance), ("eta", args.eta)):
        if value is not None:
            options[key] = value
    images = draw(model, config, args.prompt, args.num_images, args.seed)
    how = f"{options.num_steps} steps, guidance {options.guidance_scale:g}, eta {options.eta:g}, seed {args.seed}"
    captions = [prompt or "(no prompt)" for prompt in args.prompt for _ in range(args.num_images)]
    out = pathlib.Path(args.out).expanduser()
    picture = grid.captioned(images, captions, f"{name}: {how}")
    with files.replacing(out) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[out.suffix.lower()])
    print(f"{len(images)} images of {len(args.prompt)} prompts by {name}, {how} -> {out}")
