"""Trains a diffusion model on a reward.

usage: python -m ddpo_jax.main --config=FILE[:CHOICES] [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=FILE            a config file: a Python file with get_config(), such as configs/aesthetic.py
  --config=FILE:CHOICES    the same with choices, such as configs/aesthetic.py:algorithm=loop,replay=hard
  --workdir=DIR            where the run is kept; default: runs/<name of the config file>
  --config.KEY=VALUE       sets one key (below); --config.KEY VALUE is the same
  --help                   this text

The same command on the same DIR goes on where the run stopped. Exit code: 0 done, 2 wrong input, 1 failure,
129, 130 or 143 interrupted (saved).

examples:
  python -m ddpo_jax.main --config=configs/compressibility.py
  python -m ddpo_jax.main --config=configs/alignment.py:algorithm=ddpo_sf --workdir=runs/sf --config.seed=1
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import logging

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import _config as flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; lines for the user go to standard error."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(flags.help_text(__doc__ or ""))
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # rewards and prompts of the user's own, however we were started
    return cli.run(command, argv)


def command(argv: Sequence[str]) -> None:
    """Trains what the command line says.

    Raises:
      InputError, RunFailure, Interrupted: see ``train``.
    """
    arguments = flags.parse(argv)
    cli.show_log()
    config = flags.load(arguments)
    cli.join_hosts()
    backend, devices = cli.start_jax()
    from ddpo_jax.config.ready import make_ready  # here, so that wrong flags and --help answer at once

    ready = make_ready(config, backend, devices)
    chosen = f", chosen for {backend}; --config.model=... takes another" if config.model == "auto" else ""
    logging.info("model %s%s", ready.config.model, chosen)
    workdir = cli.folder_to_write(arguments.workdir, "--workdir")
    from ddpo_jax.training.loop import train

    train(ready, workdir)


if __name__ == "__main__":
    cli.leave(main())
