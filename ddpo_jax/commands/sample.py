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
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from ddpo_jax.commands import _cli as cli
from ddpo_jax.config import default_config
from ddpo_jax.config.resolve import resolve
from ddpo_jax.diffusion import sampler, schedule
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.errors import InputError
from ddpo_jax.models import lora
from ddpo_jax.training.build import Model, load_model
from ddpo_jax.training.trained import load_trained
from ddpo_jax.types import Params
from ddpo_jax.workdir import grid

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def draw(
    model: Model, prompts: Sequence[str], config: ConfigDict, seed: int, num_images: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """``num_images`` of each prompt, those of a prompt next to each other.

    Args:
      model: networks and parameters.
      prompts: texts.
      config: its ``sample`` section says how: ``num_steps``, ``guidance_scale``, ``eta``, ``batch_size``.
      seed: of the initial noise and the noise of the steps, which image k of every prompt shares.
      num_images: of each prompt.
    """
    pipe, options = model.pipeline, config.sample
    steps = schedule.make(pipe.scheduler_config, options.num_steps, options.eta)

    def denoise(params: Params, frozen: Params, uncond: jax.Array, context: jax.Array, ids: jax.Array) -> jax.Array:
        policy = Policy(steps, options.guidance_scale).bind(model.network, frozen)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)
        return sampler.sample(policy, params, keys, context, uncond, pipe.latent_shape).latents[:, -1]

    compiled = jax.jit(denoise)
    uncond, context = pipe.embed([""])[0], np.repeat(pipe.embed(list(prompts)), num_images, axis=0)
    ids = np.tile(np.arange(num_images, dtype=np.int32), len(prompts))
    count, size = len(ids), min(len(ids), options.batch_size)
    images = []
    for start in range(0, count, size):
        rows = np.resize(np.arange(start, min(start + size, count)), size)  # the last batch is filled up: one program
        latents = compiled(model.params, model.frozen, uncond, context[rows], ids[rows])
        images.append(np.asarray(pipe.decode(latents)))
    return np.concatenate(images)[:count]


def load(args: argparse.Namespace, backend: str, devices: int) -> tuple[ConfigDict, Model, str]:
    """Config, model and a few words on it, of parsed arguments."""
    if args.workdir:
        config, model = load_trained(args.workdir, args.epoch, args.ema)
        return config, model, f"{config.model} trained in {args.workdir} (epoch {args.epoch})"
    config = default_config()
    config.model = args.model
    config.train.lora_rank = 0
    config, _ = resolve(config, backend, devices)
    adapters = _read_adapters(args.lora) if args.lora else {}  # first: a wrong file shows before the model is loaded
    model = load_model(config)
    if not args.lora:
        return config, model, config.model
    model.params = adapted(model.params, adapters, args.lora)
    return config, model, f"{config.model} with {args.lora}"


def _read_adapters(path: str) -> dict[str, np.ndarray]:
    try:
        return lora.load(path)
    except InputError as error:  # of one line or more, each of which names the file
        raise InputError("\n".join(f"--lora: {line}" for line in str(error).splitlines())) from error


def adapted(params: Params, adapters: Mapping[str, np.ndarray], path: str) -> Params:
    """A network's parameters with the adapters of a file merged into them.

    Raises:
      InputError: the adapters are of another network.
    """
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
    try:
        pathlib.Path(args.out).expanduser().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: received '{args.out}'; cannot make its folder: {error.strerror}") from error


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
    config, model, name = load(args, *cli.start_jax())
    config = ConfigDict(config)
    options = config.sample
    for key, value in (("num_steps", args.steps), ("guidance_scale", args.guidance), ("eta", args.eta)):
        if value is not None:
            options[key] = value
    images = draw(model, args.prompt, config, args.seed, args.num_images)
    how = f"{options.num_steps} steps, guidance {options.guidance_scale:g}, eta {options.eta:g}, seed {args.seed}"
    captions = [prompt or "(no prompt)" for prompt in args.prompt for _ in range(args.num_images)]
    out = pathlib.Path(args.out).expanduser()
    grid.captioned(images, captions, f"{name}: {how}").save(out)
    print(f"{len(images)} images of {len(args.prompt)} prompts by {name}, {how} -> {out}")
