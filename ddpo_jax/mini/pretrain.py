"""Trains every network of the miniature and writes its assets.

A run that was stopped continues where it was. The stages read only each other's results in the work directory, so
independent ones (verifier, clip, vae) may also run as separate processes with ``--stages``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ddpo_jax.errors import InputError
from ddpo_jax.mini import assemble, quality, world
from ddpo_jax.mini.sizes import SCALES
from ddpo_jax.mini.stages import STAGES, Context
from ddpo_jax.mini.training import Stage, finished, stream, train

ORDER = ("tokenizer", "verifier", "clip", "aesthetic", "vae", "unet", "assemble", "quality")
NEEDS = {"aesthetic": ("clip",), "unet": ("clip", "vae")}
ASSETS = Path(__file__).parent / "assets"


def run(workdir: Path, assets: Path, stages: str, scale: str, seed: int, note: str = "") -> None:
    """Runs the named stages in their order.

    Raises:
      InputError: an unknown stage, a missing result of an earlier one, or a work directory of other settings.
    """
    names = list(ORDER) if stages == "all" else stages.split(",")
    for name in names:
        if name not in ORDER:
            raise InputError(f"--stages: received {name!r}; must be of {', '.join(ORDER)}; correct the name")
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
            table = quality.measure(assets, seed, context.sizes.evaluate, context.sizes.guidances, _log)
            quality.write({**table, "note": note} if note else table, assets)
            _log((assets / "QUALITY.md").read_text(encoding="utf-8"))
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
            raise InputError(f"--stages: {stage.name} needs {needed} trained to its end; add {needed} to --stages")
    watch: dict[str, Callable[[nnx.Module, int], None]] = {"vae": _vae_watch(context), "unet": _unet_watch(context)}
    begun = time.monotonic()
    train(stage, context.workdir, context.seed, on_checkpoint=watch.get(stage.name), log=_log)
    _log(f"{stage.name}: trained in {(time.monotonic() - begun) / 60:.1f} min")


def _pictures(context: Context, stage: str) -> Callable[[int], Path | None]:
    """Says where the picture of a step goes; None for all but about ``sizes.pictures`` checkpoints of a training."""
    count = context.sizes.pictures
    interval = max(1, getattr(context.sizes, stage).steps // max(1, count))
    due = [0]

    def path(step: int) -> Path | None:
        if not count or step < due[0]:
            return None
        due[0] = step + interval
        return context.workdir / "pictures" / f"{stage}_{step:05d}.png"

    return path


def _vae_watch(context: Context) -> Callable[[nnx.Module, int], None]:
    """Pictures beside their reconstructions."""
    images, where = (
        world.render_all(world.sample_scenes(stream(context.seed, "watch", 0), 12)),
        _pictures(context, "vae"),
    )

    def watch(vae: nnx.Module, step: int) -> None:
        if path := where(step):
            pixels = images.astype(np.float32) / 127.5 - 1
            rebuilt = np.asarray(nnx.jit(lambda vae, x: vae.decode(vae.encode(x)[0]))(vae, pixels))
            rebuilt = np.round(255 * np.clip(rebuilt / 2 + 0.5, 0, 1)).astype(np.uint8)
            both = np.stack([images, rebuilt], axis=1).reshape(-1, *images.shape[1:])
            quality.sheet(both, ["picture", "rebuilt"] * len(images), path, f"vae, step {step}")

    return watch


def _unet_watch(context: Context) -> Callable[[nnx.Module, int], None]:
    """Samples of the averaged UNet."""
    where = _pictures(context, "unet")

    def watch(unet: Any, step: int) -> None:
        if path := where(step):
            pipe = assemble.make_pipeline(context)
            pipe.unet = unet
            prompts = quality.pictured_prompts()
            images = quality.Sampler(pipe, guidance=context.sizes.guidances[-1])(prompts, context.seed)
            quality.sheet(images, prompts, path, f"unet, step {step}")

    return watch
