"""Compares finished runs: a table, two plots and the curves as a small JSON file.

Runs are grouped by what differs in their configs; seeds of a group are averaged. For every group: the final reward, the
reward queries after which it first reaches the final reward of the baseline, and how many times fewer that is than the
baseline itself needs. The baseline is --baseline, or the plainest group: the one with the fewest settings that differ
from the defaults.

Where the runs were evaluated in training (log.evaluate_every), the evaluations are compared: they are of the same
prompts and noise, so nothing is smoothed, every curve starts at the untrained model, and gains over it are told as
well: the interquartile mean over seeds of the gain, the same in units of the baseline's, the probability that a run
beats one of the baseline, each with its 95 % bootstrap interval, and the speed-up counted in calls of the denoiser,
since replay buys queries with computation.

Curves are smoothed by a running average over the last queries: 500 where the shortest run has 4000 or more (as in
"Selective Timestep Weighting", Fig. 7), an eighth of the shortest run where it has fewer, or --smooth. The final reward
is the last point of the smoothed curve. Shaded: one standard deviation over seeds.

examples:
  ddpo_jax compare runs/ddpo_seed* runs/loop_seed*
  ddpo_jax compare runs/*/ --metric=reward/color --baseline=algorithm=ddpo --out=color
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.studies.compare import compare, read_runs, table


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("compare", __doc__)
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="folder of a run (its --workdir)")
    parser.add_argument(
        "--metric", default="", help="of metrics.jsonl; eval/reward/mean where runs were evaluated, else reward/mean"
    )
    parser.add_argument("--baseline", default="", help="settings of the baseline's group, such as algorithm=ddpo")
    parser.add_argument("--smooth", type=cli.positive, default=None, help="reward queries to average over")
    parser.add_argument("--out", default="compare", help="folder for compare.json and the plots; compare")
    args = parser.parse_args(argv)
    out = cli.folder_to_write(args.out, "--out")
    result = compare(read_runs(args.run_dir), out, args.metric, args.baseline, args.smooth)
    print(f"{table(result)}\nin {out}: compare.json, compare_queries.png, compare_time.png")
