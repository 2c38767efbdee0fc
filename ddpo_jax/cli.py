"""Command lines of the tools: flags, and wrong input as one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ddpo_jax import errors


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are ``ValueError`` of one line."""

    def __init__(self, module: str, doc: str | None):
        """Args:
        module: run as ``python -m <module>``.
        doc: what the tool does; shown by --help.
        """
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse for whatever is wrong."""
        raise ValueError(f"{' '.join(message.split())}; see {self.prog} --help")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}; it must be a whole number of at least 1; use 4")
    return int(text)


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls ``command(arguments)`` and returns its exit code: 0, 2 for wrong input, 1 for a failure, 130 for an interruption."""
    try:
        command(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        if not errors.raised_here(error):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except errors.RunFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
