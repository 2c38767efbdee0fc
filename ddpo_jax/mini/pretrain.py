"""Trains every network of the miniature and writes its assets: ``python -m ddpo_jax.mini.pretrain --workdir=DIR``.

A run that was stopped continues where it was. The stages read only each other's results in the work directory, so
independent ones (verifier, clip, vae) may also run as separate processes with ``--stages``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from ddpo_jax.mini import assemble, grammar, quality, world
from ddpo_jax.mini.sizes import SCALES
from ddpo_jax.mini.stages import STAGES, Context
from ddpo_jax.mini.training import Stage, finished, stream, train
from ddpo_jax.models.pipeline import Pipeline

ORDER = ("tokenizer", "verifier", "clip", "aesthetic", "vae", "unet", "assemble", "quality")
NEEDS = {"aesthetic": ("clip",), "unet": ("clip", "vae")}
ASSETS = Path(__file__).parent / "assets"
PICTURE_PROMPTS = 24


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ddpo_jax.mini.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/pretrain"), help="checkpoints and pictures")
    parser.add_argument("--stages", default="all", help=f"comma-separated, of {', '.join(ORDER)}; default all")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full", help="tiny is for a trial of a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--assets", type=Path, help="folder to write; default: the package's own at full scale, else WORKDIR/assets"
    )
    options = parser.parse_args(arguments)
    assets = options.assets or (ASSETS if options.scale == "full" else options.workdir / "assets")
    try:
        run(options.workdir, assets, options.stages, options.scale, options.seed)
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain: stopped; the same command continues at the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(workdir: Path, assets: Path, stages: str, scale: str, seed: int) -> None:
    """Runs the named stages in their order.

    Raises:
      ValueError: an unknown stage, a missing result of an earlier one, or a work directory of other settings.
    """
    names = list(ORDER) if stages == "all" else stages.split(",")
    for name in names:
        if name not in ORDER:
            raise ValueError(f"--stages: received {name!r}; must be of {', '.join(ORDER)}; correct the name")
    workdir.mkdir(parents=True, exist_ok=True)
    context = Context(workdir, seed, SCALES[scale])
    begun = time.monotonic()
    for name in sorted(set(names), key=ORDER.index):
        if name == "tokenizer":
            _log(f"tokenizer: {context.tokenizer.vocab_size} tokens")
        elif name == "assemble":
            size = assemble.write(context, assets)
            _log(f"assemble: {size / 2**20:.1f} MiB in {assets}")
        elif name == "quality":
            table = quality.measure(assets, seed, context.sizes.evaluate, _log)
            quality.write(table, assets)
            _pictures(context, None, assets / "samples.png", "quality: samples of the miniature")
            _log(quality.markdown(table))
        else:
            _train(context, STAGES[name](context))
    _log(f"pretrain: done in {(time.monotonic() - begun) / 60:.1f} min")


def _log(line: str) -> None:
    print(line, flush=True)


def _train(context: Context, stage: Stage) -> None:
    if finished(stage, context.workdir, context.seed):
        _log(f"{stage.name}: already trained")
        return
    for needed in NEEDS.get(stage.name, ()):
        if not finished(STAGES[needed](context), context.workdir, context.seed):
            raise ValueError(f"--stages: {stage.name} needs {needed} trained to its end; add {needed} to --stages")
    watch: dict[str, Callable[[nnx.Module, int], None]] = {"vae": _vae_watch(context), "unet": _unet_watch(context)}
    begun = time.monotonic()
    train(stage, context.workdir, context.seed, on_checkpoint=watch.get(stage.name), log=_log)
    _log(f"{stage.name}: trained in {(time.monotonic() - begun) / 60:.1f} min")


def _every(context: Context, stage: str, count: int) -> int:
    """Steps between two pictures, so that there are about ``count`` of them."""
    return max(1, getattr(context.sizes, stage).steps // count)


def _vae_watch(context: Context) -> Callable[[nnx.Module, int], None]:
    """Pictures and their reconstructions, at every fifth of the training."""
    images = world.render_all(world.sample_scenes(stream(context.seed, "watch", 0), 12))
    seen = [-1]

    def watch(vae: nnx.Module, step: int) -> None:
        if step // _every(context, "vae", 5) == seen[0] // _every(context, "vae", 5):
            return
        seen[0] = step
        pixels = images.astype(np.float32) / 127.5 - 1
        rebuilt = np.asarray(nnx.jit(lambda vae, x: vae.decode(vae.encode(x)[0]))(vae, pixels))
        rebuilt = np.round(255 * np.clip(rebuilt / 2 + 0.5, 0, 1)).astype(np.uint8)
        both = np.stack([images, rebuilt], axis=1).reshape(-1, *images.shape[1:])
        captions = ["picture", "rebuilt"] * len(images)
        quality.sheet(both, captions, context.workdir / "pictures" / f"vae_{step:05d}.png", f"vae, step {step}")

    return watch


def _unet_watch(context: Context) -> Callable[[nnx.Module, int], None]:
    """Samples of the averaged UNet, at every fifth of the training."""
    seen = [-1]

    def watch(unet: nnx.Module, step: int) -> None:
        if step // _every(context, "unet", 5) == seen[0] // _every(context, "unet", 5):
            return
        seen[0] = step
        _pictures(context, unet, context.workdir / "pictures" / f"unet_{step:05d}.png", f"unet, step {step}")

    return watch


def _pictures(context: Context, unet: nnx.Module | None, path: Path, title: str) -> None:
    """A contact sheet of samples, three of each kind of training prompt."""
    pipe: Pipeline = assemble.make_pipeline(context)
    if unet is not None:
        pipe.unet = unet
    prompts = grammar.training_prompts()
    chosen = [prompts[i * len(prompts) // PICTURE_PROMPTS] for i in range(PICTURE_PROMPTS)]
    quality.sheet(quality.sample(pipe, chosen, context.seed), chosen, path, title)


if __name__ == "__main__":
    sys.exit(main())
