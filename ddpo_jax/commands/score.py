"""Scores image files, so that a reward can be checked against its published values before a long run.

Images of any size and format are read as for the published scores, by Pillow's conversion to RGB. Either all are scored
for --prompt, or --prompts names a CSV (first line: file,prompt) or .jsonl file ({"file": ..., "prompt": ...}) in their
folder; its further columns or keys are metadata for the reward. The last row is the mean, which most published values
are. Each reward's file in ddpo_jax/rewards states them.

Options of a reward are --reward.KEY=VALUE, for every reward named that has the key, or stand in brackets.

examples:
  ddpo_jax score --reward=hps --reward.version=v2 --prompt="a photo of a cat" cat.png
  ddpo_jax score --reward=aesthetic,'clip_score[weights=L/14]',my_package.rewards:mine --prompts=images/prompts.csv
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpo_jax.commands import _cli as cli
from ddpo_jax.config import default_config
from ddpo_jax.config.defaults import STABLE_DIFFUSION
from ddpo_jax.config.model import local_folder
from ddpo_jax.config.override import override
from ddpo_jax.errors import InputError
from ddpo_jax.rollout.scoring import make_reward
from ddpo_jax.studies import score
from ddpo_jax.studies.rewards import choose_rewards
from ddpo_jax.workdir import show

PREFIX = "--reward."


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the options of rewards as (``reward.key``, value).

    Raises:
      InputError: one line for what is wrong.
    """
    parser = cli.Parser("score", __doc__)
    parser.add_argument("--reward", required=True, help="names with commas, package.module:function among them")
    parser.add_argument("--prompt", help="of all images")
    parser.add_argument("--prompts", help="a CSV or .jsonl file with the images and their prompts")
    parser.add_argument(
        "--model", default="auto", help="whose weights where a reward has several; auto = mini for 32 x 32 images only"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, with --prompt")
    options = [word for word in argv if word.startswith(PREFIX)]
    args = parser.parse_intermixed_args([word for word in argv if word not in options])
    pairs = [word.removeprefix("--").partition("=") for word in options]
    for key, equals, _ in pairs:
        if not equals:
            raise InputError(f"--{key}: received no value; write --{key}=VALUE")
    if (args.prompts is None) == (args.prompt is None):
        raise InputError(
            "--prompt: every image is scored for a prompt; give --prompt=TEXT with images, or --prompts=FILE"
        )
    if args.prompts is None and not args.images:
        raise InputError("IMAGE: received no file; name the images after --prompt, or give --prompts=FILE")
    if args.prompts is not None and args.images:
        raise InputError(f"IMAGE: received {args.images[0]!r} with --prompts, which names the images; leave out one")
    return args, [(key, value) for key, _, value in pairs]


def main(argv: Sequence[str]) -> None:
    """The command."""
    args, options = parse(argv)
    cli.show_log()
    items = score.read_items(args.prompts) if args.prompts is not None else score.one_prompt(args.images, args.prompt)
    shapes = score.sizes(items)
    model = ("mini" if score.is_miniature(shapes) else STABLE_DIFFUSION) if args.model == "auto" else args.model
    local_folder(model)  # refuses what can be no model
    config = default_config()
    override(config, [("model", model)])
    cli.start_jax()
    chosen = choose_rewards(config, args.reward, options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # what a reward prints is no result
        rewards = {}
        for name, (section, member) in chosen.items():
            logging.info("%s (%s)", name, ", ".join(f"{key}={value}" for key, value in _told(section).items()))
            rewards[name] = make_reward(section, member)
            stack.callback(getattr(rewards[name], "close", lambda: None))
        tables = score.score(items, shapes, rewards)
    told = {name: _told(section) for name, (section, _) in chosen.items()}
    print(_json(items, told, tables) if args.json else _table(items, tables))


def _told(section: ConfigDict) -> dict[str, Any]:
    """The options that decide a score; no secrets."""
    return {key: value for key, value in section.items() if key not in ("name", "token", "wait_s")}


def _table(items: Sequence[score.Item], tables: dict[str, np.ndarray]) -> str:
    lines = [("", *tables)]
    for row, item in enumerate(items):
        lines.append((str(item.path), *(_cell(values[row]) for values in tables.values())))
    if len(items) > 1:
        lines.append((f"mean of {len(items)}", *(_cell(_mean(values)) for values in tables.values())))
    return show.table(lines)


def _json(items: Sequence[score.Item], rewards: dict[str, Any], tables: dict[str, np.ndarray]) -> str:
    images = [
        {"file": str(item.path), "prompt": item.prompt, "scores": {name: _number(x[row]) for name, x in tables.items()}}
        for row, item in enumerate(items)
    ]
    mean = {name: _number(_mean(values)) for name, values in tables.items()}
    return json.dumps({"rewards": rewards, "images": images, "mean": mean}, indent=2)


def _mean(values: np.ndarray) -> float:
    """Of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)].astype(np.float64)
    return float(known.mean()) if known.size else math.nan


def _cell(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "-"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
