"""Trains every network of the embedded miniature and writes its assets.

A run that was stopped continues where it was. The stages read only each other's results in the work directory, so
independent ones (verifier, clip, vae) may also run as separate processes with --stages.

example:
  ddpo_jax pretrain --workdir=runs/pretrain --scale=tiny
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_jax.commands import _cli as cli
from ddpo_jax.mini.pretrain import ASSETS, ORDER, run
from ddpo_jax.mini.sizes import SCALES


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("pretrain", __doc__)
    parser.add_argument("--workdir", default="runs/pretrain", help="checkpoints and pictures")
    parser.add_argument("--stages", default="all", help=f"comma-separated, of {', '.join(ORDER)}; default all")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full", help="tiny is for a trial of a minute")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of everything drawn; 0")
    parser.add_argument(
        "--assets", help="folder to write; default: the package's own at full scale, else WORKDIR/assets"
    )
    parser.add_argument("--note", default="", help="a remark on this run, kept in the quality table")
    options = parser.parse_args(argv)
    workdir = cli.folder_to_write(options.workdir, "--workdir")
    default = ASSETS if options.scale == "full" else workdir / "assets"
    assets = cli.folder_to_write(options.assets or default, "--assets")
    run(workdir, assets, options.stages, options.scale, options.seed, options.note)
