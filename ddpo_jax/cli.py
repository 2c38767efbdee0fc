"""Command lines of the tools: flags, and wrong input as one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ddpo_jax import errors

MAX_CPU_DEVICES = 8  # beyond it a device's share of a batch of the miniature is too small to keep a core busy


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


def use_all_cores() -> None:
    """Makes every CPU core a device of its own; call it before JAX starts.

    XLA:CPU runs a network of the miniature's size on one core, whatever it has; as devices of a mesh the cores work
    side by side. Their number is a power of two, so that it divides usual batch sizes; ``JAX_NUM_CPU_DEVICES`` and
    ``XLA_FLAGS`` have the last word.
    """
    import jax  # not at the top: --help and wrong flags answer at once

    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", min(1 << (cores.bit_length() - 1), MAX_CPU_DEVICES))


def cache_compilations() -> None:
    """Keeps compiled programs between processes, in ``~/.cache/ddpo_jax`` unless JAX was told another place."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # attributes are made at run time
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "ddpo_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls ``command(arguments)`` and returns its exit code: 0, 2 for wrong input, 1 failure, 130 interrupted."""
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
    except errors.Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
