"""Trains a list of configs with several seeds, one after another or in parallel, and compares them.

FILE is a Python file (see configs/sweeps) whose docstring states the claim, with

  runs()     a list of dicts: "config" (a config file with choices, as for --config, its path relative to FILE), "name",
             optionally "panel" (only runs of a panel are compared with each other), and any config keys
  BASELINE   optional: the "name" of the baseline's runs; the plainest ones, see ddpo_jax compare
  METRIC     optional: what is compared; the evaluations in training where there are any, else reward/mean
  SEEDS      optional: how many seeds, from 0; 3
  DIFFERENCE optional: the difference to be shown, in units of the baseline's gain; two seeds of the baseline then say
             how many show it (a pilot: --seeds=0,1 --only='*/NAME' with the baseline's name)
  EVALUATE   optional: flags of ddpo_jax evaluate, which then follows every run; {reward} stands for the run's reward

A run is kept in OUT/<panel>/<name>/seed<seed>, its output in log.txt there. The same command goes on where it stopped:
finished runs are skipped, others resume. A run that fails does not stop the others, but the exit code is 1.

examples:
  ddpo_jax sweep configs/sweeps/weighting_and_replay.py
  ddpo_jax sweep configs/sweeps/iskl.py --seeds=0 --only='aesthetic/*' --config.num_epochs=4
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shlex
import sys
from collections.abc import Sequence

from ddpo_jax import errors
from ddpo_jax.commands import _cli as cli
from ddpo_jax.errors import InputError
from ddpo_jax.studies import sweep


def _seeds(text: str) -> list[int]:
    try:
        numbers = [cli.seed(number.strip()) for number in text.split(",")]
    except argparse.ArgumentTypeError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds: received '{text}'; it must be different whole numbers with commas; use 0,1,2")
    return numbers


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed; runs go on, and their logs are in their folders
        print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("sweep", __doc__)
    parser.add_argument("file", metavar="FILE", help="a sweep file")
    parser.add_argument("--out", default="", help="folder of the runs; runs/sweeps/<name of FILE>")
    parser.add_argument("--parallel", type=cli.positive, default=1, help="runs at the same time; 1")
    parser.add_argument("--only", default="", help="glob patterns on <panel>/<name>, with commas; all")
    parser.add_argument("--seeds", default="", help="of each run, with commas; as many as FILE says, or 0,1,2")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    extra = [word for word in argv if word.startswith("--config.")]
    args = parser.parse_args([word for word in argv if word not in extra])
    if wrong := [word for word in extra if "=" not in word]:
        raise InputError(f"{wrong[0]}: received no value; write {wrong[0]}=VALUE, which every run gets")
    file = pathlib.Path(args.file)
    plan = sweep.load(file)
    given = args.out or f"runs/sweeps/{file.stem}"
    out = pathlib.Path(given).expanduser() if args.dry_run else cli.folder_to_write(given, "--out")
    seeds = _seeds(args.seeds) if args.seeds else list(range(plan.get("SEEDS", 3)))
    todo = sweep.jobs(plan, file, out, seeds, args.only, extra)
    if args.dry_run:
        print("\n".join(shlex.join(command) for job in todo for command in job.commands.values()))
        return
    failed = sweep.Runner(_say).run(todo, args.parallel)
    print("\n\n".join(sweep.summarise(todo, failed, out, plan)))
    if failed:
        raise errors.RunFailure(f"{len(failed)} of {len(todo)} runs failed: {', '.join(map(str, failed))}")
