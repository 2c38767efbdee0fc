"""Measures which denoising steps decide the reward ("Selective Timestep Weighting" (anonymous), Fig. 2 and 3).

usage: ddpo_jax measure --config=FILE[:CHOICES] --out=DIR [--config.KEY=VALUE ...] [flags below]

  x0_change         the reward of the predicted clean image at every step, and by how much each step changes it
  branch_variance   denoise to a step, branch into many continuations with fresh noise, and take the variance of their
                    final rewards: sigma_t^2. The first steps are computed once for all branches.

Model, reward, prompts, steps, guidance, seed and the batch size come from the config; its algorithm does not matter.
Writes DIR/measure.json and DIR/measure.png and prints the table. A run takes it as its timestep weighting with
weighting=advantage_variance,weighting.table=DIR/measure.json.

example:
  ddpo_jax measure --config=configs/compressibility.py --out=runs/measure --num-prompts=16 --branches=8
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import _config as flags
from ddpo_jax.config import choose
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.studies.measure import BRANCH, X0, Plan, measure, text, write


def parse(argv: Sequence[str]) -> tuple[flags.Arguments, str, Plan]:
    """(config, folder for the results, plan) of a command line.

    Raises:
      InputError: one line for each wrong flag.
    """
    parser = cli.Parser("measure", __doc__)
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--what", default=f"{X0},{BRANCH}", help="what to measure, with commas; both")
    parser.add_argument("--num-prompts", type=cli.positive, default=Plan.num_prompts, help="prompts drawn; 16")
    parser.add_argument("--repeats", type=cli.positive, default=Plan.repeats, help="trajectories of each prompt; 1")
    parser.add_argument("--branches", type=cli.positive, default=Plan.branches, help="continuations; 8")
    args, rest = parser.parse_known_args(argv)
    faults = []
    what = tuple(dict.fromkeys(part.strip() for part in args.what.split(",")))
    if not set(what) <= {X0, BRANCH}:
        faults.append(f"--what: received {args.what!r}; it must be {X0}, {BRANCH} or both with a comma; use {X0}")
    if args.branches < 2 and BRANCH in what:
        faults.append(f"--branches: received {args.branches}; a variance takes at least 2; use 8")
    if any(word.partition("=")[0] == "--workdir" for word in rest):
        faults.append("--workdir: this is no run; results go to --out; leave it out")
    try:
        arguments = flags.parse(rest)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return arguments, args.out, Plan(what, args.num_prompts, args.repeats, args.branches)


def main(argv: Sequence[str]) -> None:
    """The command."""
    arguments, out, plan = parse(argv)
    cli.show_log()
    config = flags.load(arguments)
    choose(config, "weighting", "uniform")  # the one of the config may need the table that this writes
    ready = make_ready(config, *cli.start_jax())
    folder = cli.folder_to_write(out, "--out")
    table = measure(ready, plan)
    write(table, folder)
    print(text(table))
    print(f"wrote {folder / 'measure.json'} and {folder / 'measure.png'}")
