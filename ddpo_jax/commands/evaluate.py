"""Scores what a run has trained on prompts, against the model it started from.

Both models draw every prompt from the same noise, with the steps, guidance and eta of the run, so differences are
paired. Means and 95 % confidence intervals (Student's t) treat prompts as the sample: images of a prompt are averaged
first; with a single prompt, its images are the sample. A part of a reward that says nothing of a prompt leaves it out.

--prompts=training is the run's own source; novel the same source with split=novel, else a text file, one prompt a line.
--rewards takes names with optional options in brackets: mini_verifier,'clip_score[scale=100]'; the run's if left out.

Written to --out: evaluation.json, images.png (untrained above trained), chunks/. The same command goes on where it was
interrupted.

example:
  ddpo_jax evaluate --workdir=runs/aesthetic --prompts=novel --rewards=aesthetic,clip_score
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.studies.evaluate import evaluate


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--epoch", default="latest", help="finished epochs of a checkpoint, or latest, or best")
    parser.add_argument("--ema", action="store_true", help="the average of the parameters (train.ema_decay > 0)")
    parser.add_argument("--prompts", default="novel", help="novel, training or a text file; novel")
    parser.add_argument("--num-prompts", type=cli.positive, default=None, help="45 of a source, all of a file")
    parser.add_argument("--samples-per-prompt", type=cli.positive, default=10, help="images of each prompt; 10")
    parser.add_argument("--rewards", default="", help="names with commas; the run's")
    parser.add_argument("--batch-size", type=cli.positive, default=None, help="images drawn at once; the run's")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of all noise; 0")
    parser.add_argument("--out", default="", help="folder to write; WORKDIR/evaluation")
    args = parser.parse_args(argv)
    cli.start_jax()
    print(evaluate(args))
