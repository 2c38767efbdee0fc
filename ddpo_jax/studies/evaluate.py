"""Scores what a run has trained on prompts, against the model it started from.

Both models draw every prompt from the same noise, with the steps, guidance and eta of the run, so differences are
paired. Means and 95 % confidence intervals (Student's t) treat prompts as the sample: images of a prompt are averaged
first; with a single prompt, its images are the sample. A part of a reward that says nothing of a prompt leaves it out.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import errors, find, sharding
from ddpo_jax.config import default_config
from ddpo_jax.config.model import read_json
from ddpo_jax.config.override import override
from ddpo_jax.errors import InputError
from ddpo_jax.prompts import make_prompts
from ddpo_jax.rewards._shared.check import call
from ddpo_jax.rewards._shared.groups import in_groups
from ddpo_jax.rollout import scoring as reward_runner
from ddpo_jax.studies import curves
from ddpo_jax.studies.rewards import choose_rewards
from ddpo_jax.training.build import make_sampler
from ddpo_jax.training.trained import load_trained
from ddpo_jax.workdir import files, grid, show

MODELS = ("base", "trained")
SHOWN = 8  # prompts of the picture
Prompts = list[tuple[str, dict[str, Any]]]  # with metadata
Rewards = dict[str, Callable[..., Any]]


def find_prompts(config: ConfigDict, wanted: str, count: int | None, seed: int) -> Prompts:
    """Distinct prompts with their metadata.

    Args:
      config: of the run.
      wanted: "training", "novel" or a text file.
      count: how many at most; None is all of a file, 45 of a source.
      seed: of the draw from a source.

    Raises:
      InputError: they cannot be had.
    """
    section = config.prompts
    if wanted not in ("training", "novel"):
        chosen = default_config()
        override(chosen, [("prompts.name", "file"), ("prompts.path", wanted), ("prompts.shuffle", "false")])
        section = chosen.prompts
    elif wanted == "novel":
        if "split" not in section:
            why = f"the run's source {section.name!r} has no novel split"
            raise InputError(f"--prompts: received 'novel'; {why}; give a text file")
        section = ConfigDict(section)
        section.split = "novel"
        if "count" in section:  # of the prompts that are trained
            section.count = 0
    source = make_prompts(section, find.find("prompts", section.name))
    number = count or (_lines(section.path) if section.name == "file" else 45)
    return list(dict(zip(*source(np.random.default_rng(seed), number), strict=True)).items())


def _lines(path: str) -> int:
    return sum(bool(line.strip()) for line in pathlib.Path(path).expanduser().read_bytes().splitlines())


def make_rewards(config: ConfigDict, text: str) -> Rewards:
    """Reward functions by their text in ``--rewards``; the run's own if that is empty.

    Raises:
      InputError: one of them cannot be had.
    """
    if not text:
        return {config.reward.name: reward_runner.make_reward(config.reward, find.find("rewards", config.reward.name))}
    chosen = choose_rewards(config, text)
    return {name: reward_runner.make_reward(section, member) for name, (section, member) in chosen.items()}


def score_chunks(
    draw: Callable[[list[str], np.ndarray], np.ndarray],
    rewards: Rewards,
    prompts: Prompts,
    samples: int,
    size: int,
    folder: pathlib.Path,
    label: str,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draws and scores all images chunk by chunk; chunks that are in ``folder`` are read instead.

    Args:
      draw: (prompts, image numbers) -> images.
      rewards: functions by name.
      prompts: P of them.
      samples: K images of each.
      size: images of a chunk.
      folder: of the chunks.
      label: of the model; begins the files' names.

    Returns:
      Scores [P, K] by reward and by ``reward/part``, and the first image of each of the first prompts.

    Raises:
      errors.RunFailure: a reward failed; finished chunks stay.
    """
    total = len(prompts) * samples
    tables: dict[str, np.ndarray] = {}
    pictures = []
    for start in range(0, total, size):
        path = folder / f"{label}_{start:06d}.npz"
        rows = np.arange(start, min(start + size, total))
        stored = _read_chunk(path)
        if stored is None:
            chosen = [prompts[row // samples] for row in rows]
            names, metadata = [prompt for prompt, _ in chosen], [entry for _, entry in chosen]
            images = draw(names, rows)
            found: dict[str, np.ndarray] = {}
            for name, reward in rewards.items():
                try:
                    scores, parts = call(reward, images, names, metadata, name)
                except reward_runner.RewardError as error:
                    raise errors.RunFailure(f"{error}; finished chunks are kept, the same command goes on") from error
                found |= {name: scores} | {f"{name}/{part}": values for part, values in parts.items()}
            shown = images[(rows % samples == 0) & (rows // samples < SHOWN)]
            stored = {"images": shown, "names": np.array([*found]), "scores": np.stack([*found.values()])}
            with files.replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **stored)  # type: ignore[arg-type]  # numpy's stub takes a value for allow_pickle
            print(f"{label}: {rows[-1] + 1} of {total} images", file=sys.stderr, flush=True)
        pictures.append(stored["images"])
        for name, values in zip(stored["names"].tolist(), stored["scores"], strict=True):
            tables.setdefault(name, np.full(total, np.nan))[rows] = values
    return {name: values.reshape(-1, samples) for name, values in tables.items()}, np.concatenate(pictures)


def _read_chunk(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a chunk; None if there is none, or a damaged one, which is drawn again."""
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in ("images", "names", "scores")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{path} cannot be read ({errors.one_line(error)}): it is drawn again", file=sys.stderr, flush=True)
        return None


def statistics(scores: np.ndarray) -> dict[str, float | int | None]:
    """Mean, half width of its 95 % interval and number of prompts of scores [P, K] with NaN where there is none."""
    known = scores[~np.isnan(scores).all(axis=1)]
    means = np.nanmean(known, axis=1)
    sample = known[0][~np.isnan(known[0])] if len(known) == 1 else means
    if not len(known):
        return {"mean": None, "half_width": None, "prompts": 0}
    mean, half_width = curves.interval(np.asarray(sample, np.float64))
    return {"mean": mean, "half_width": half_width, "prompts": len(known)}


def table(rewards: dict[str, Any]) -> str:
    """The result as text."""

    def cell(entry: dict[str, Any], sign: str = "") -> str:
        if entry["mean"] is None:
            return "-"
        spread = "" if entry["half_width"] is None else f" ± {entry['half_width']:.2g}"
        return f"{entry['mean']:{sign}.4g}{spread}"

    lines = [("", "untrained", "trained", "difference")]
    for name, row in rewards.items():
        lines.append((name, cell(row["base"]), cell(row["trained"]), cell(row["difference"], "+")))
    return show.table(lines)


def evaluate(args: argparse.Namespace) -> str:
    """Does what the parsed arguments say; returns the table."""
    config, model = load_trained(args.workdir, args.epoch, args.ema)
    prompts = find_prompts(config, args.prompts, args.num_prompts, args.seed)
    rewards = make_rewards(config, args.rewards)
    mesh = sharding.make_mesh(-1, math.gcd(config.mesh.fsdp, jax.device_count()))
    wanted = args.batch_size or config.sample.batch_size
    size = math.ceil(wanted / mesh.size) * mesh.size
    k = args.samples_per_prompt
    rewards = {name: in_groups(fn, k, name) for name, fn in rewards.items()}
    whole = any(getattr(fn, "groupwise", False) for fn in rewards.values())
    chunk = max(size // k, 1) * k if whole else size
    out = files.folder_to_write(args.out or os.path.join(args.workdir, "evaluation"), "--out")
    settings = {
        "workdir": str(args.workdir),
        "epoch": args.epoch,
        "ema": args.ema,
        "prompts": [prompt for prompt, _ in prompts],
        "samples_per_prompt": k,
        "rewards": [*rewards],
        "seed": args.seed,
        "batch_size": size,
        "sample": {key: config.sample[key] for key in ("num_steps", "eta", "guidance_scale")},
        "checksum": float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in model.params.values())),
    }
    _refuse_other(out, settings)
    sampler, key = make_sampler(model, config, mesh), jax.random.key(args.seed)
    tables, pictures = {}, []
    for label, params in zip(MODELS, (model.reference, model.params), strict=True):
        placed = sharding.put_params(params, mesh, sampler.rules)
        tables[label], images = score_chunks(
            functools.partial(sampler.images, placed, key=key, batch_size=size),
            *(rewards, prompts, k, chunk, out / "chunks", label),
        )
        pictures.append(images)
    result: dict[str, Any] = {}
    for name in tables["base"]:
        base, trained = (tables[label][name] for label in MODELS)
        values = {"base": base, "trained": trained, "difference": trained - base}
        result[name] = {label: statistics(scores) for label, scores in values.items()}
    files.write_json(out / "evaluation.json", {"settings": settings, "rewards": result})
    count = len(pictures[0])
    captions = [f"{label}: {prompts[i][0]}" for label in ("untrained", "trained") for i in range(count)]
    picture = grid.captioned(np.concatenate(pictures), captions, f"{args.workdir}, epoch {args.epoch}")
    with files.replacing(out / "images.png") as temporary:
        picture.save(temporary, format="PNG")
    return f"{len(prompts)} prompts x {k} images\n{table(result)}\nin {out}: evaluation.json, images.png"


def _refuse_other(out: pathlib.Path, settings: dict[str, Any]) -> None:
    """Notes the settings in ``out``; chunks of other settings there are refused."""
    path = out / "settings.json"
    before = read_json(path) if path.exists() else settings
    if changed := [key for key in settings if settings[key] != before.get(key)]:
        what = "the trained parameters" if changed == ["checksum"] else ", ".join(changed)
        raise InputError(f"--out: received '{out}', which holds an evaluation with other {what}; use another --out")
    files.write_json(path, settings)
