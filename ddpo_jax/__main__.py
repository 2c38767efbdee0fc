"""``ddpo_jax COMMAND ...``, which is ``python -m ddpo_jax COMMAND ...``."""

from __future__ import annotations

import ast
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ddpo_jax import find
from ddpo_jax import main as training

COMMANDS = pathlib.Path(__file__).parent / "commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if name == "train":
        return training.main(rest)
    names = commands()
    if name not in names:
        near = find.nearest(name, ["train", *names])
        meant = f"; did you mean {near}?" if near else ""
        print(f"error: there is no command {name!r}{meant} Commands: train, {', '.join(names)}", file=sys.stderr)
        return 2
    from ddpo_jax.commands import _cli

    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # rewards and prompts of the user's own, however we were started
    return _cli.run(lambda rest: importlib.import_module(f"ddpo_jax.commands.{name}").main(rest), rest)


def commands() -> list[str]:
    """The names of the commands beside ``train``: the files of ``ddpo_jax/commands``."""
    return sorted(path.stem for path in COMMANDS.glob("*.py") if path.stem[0] != "_")


def help_text() -> str:
    """Every command with the first sentence of its file."""
    lines = ["usage: ddpo_jax COMMAND [--help] ...", "", f"  {'train':10} Trains a diffusion model on a reward."]
    for name in commands():
        doc = ast.get_docstring(ast.parse((COMMANDS / f"{name}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:10} {doc.partition(chr(10) * 2)[0].replace(chr(10), ' ')}")
    return "\n".join([*lines, "", "ddpo_jax COMMAND --help says more; ddpo_jax train --help lists every config key."])


def console() -> NoReturn:
    """What the installed command ``ddpo_jax`` calls: the same, and the process ends with the exit code."""
    from ddpo_jax.commands import _cli

    _cli.leave(main())


if __name__ == "__main__":
    console()
