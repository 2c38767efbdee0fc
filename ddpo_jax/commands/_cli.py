"""What every command shares: flags, exit codes, the log, and how JAX is started on this machine."""

from __future__ import annotations

import argparse
import contextlib
import logging as std_logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags, logging

import ddpo_jax
from ddpo_jax import errors
from ddpo_jax.errors import InputError
from ddpo_jax.hosts import runtime
from ddpo_jax.workdir.files import file_to_write, folder_to_write

__all__ = ["Parser", "cache_compilations", "file_to_write", "folder_to_write", "join_hosts", "leave", "positive", "run",
           "seed", "show_log", "start_jax", "use_all_cores"]  # fmt: skip

PACKAGE = pathlib.Path(ddpo_jax.__file__).resolve().parent
REWARD_THREAD = "reward"  # as ``rollout.scoring`` names it, which is not imported here: it loads JAX
MAX_CPU_DEVICES = 8  # beyond it a device's share of a batch of the miniature is too small to keep a core busy


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are ``InputError`` of one line."""

    def __init__(self, command: str, doc: str | None):
        """Args:
        command: run as ``ddpo_jax <command>``.
        doc: what the command does; shown by --help.
        """
        super().__init__(
            prog=f"ddpo_jax {command}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse for whatever is wrong."""
        raise InputError(f"{' '.join(message.split()).removeprefix('argument ')}; see {self.prog} --help")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}; it must be a whole number of at least 1; use 4")
    return int(text)


def seed(text: str) -> int:
    """A whole number that JAX takes as a seed."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"received {text!r}; it must be a whole number from 0 to 2147483647; use 0")
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


def join_hosts() -> None:
    """Makes this process one of a run of several, if its environment says so; process 0 tells of the progress.

    Raises:
      InputError, RunFailure: see ``hosts.runtime.start``.
    """
    if runtime.start() > 0:
        logging.set_verbosity(logging.WARNING)


def start_jax(cache: bool = True) -> tuple[str, int]:
    """``(backend, number of devices)`` of JAX, started with every CPU core and, unless told not to, its cache.

    Raises:
      InputError: JAX finds no device.
    """
    import jax

    use_all_cores()
    if cache:
        cache_compilations()
    try:
        return jax.default_backend(), jax.device_count()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a platform it knows but lacks is there
        platforms = os.environ.get("JAX_PLATFORMS", "")
        cause = " ".join(str(error).split()) or "the platform is not installed"
        raise InputError(f"JAX_PLATFORMS: received {platforms!r}; JAX finds no device: {cause}; use cpu") from error


def plain_log() -> None:
    """Sends warnings of this package, and errors of others, to standard error as plain lines."""
    flags.FLAGS.mark_as_parsed()  # absl has no flags of ours; it warns of a log before they are parsed
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.filters = [_is_shown]
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)


def show_log() -> None:
    """What this package tells of its progress as well."""
    plain_log()
    logging.set_verbosity(logging.INFO)


def _is_shown(record: std_logging.LogRecord) -> bool:
    """Whether a user should read it: what this package says, and errors of others. Libraries warn of themselves.

    Errors of orbax reach this package as exceptions, of which it says one line.
    """
    path = pathlib.Path(record.pathname)
    if PACKAGE in path.resolve().parents:
        return True
    return record.levelno >= std_logging.ERROR and not {"orbax", "asyncio"} & set(path.parts)


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Calls ``command(arguments)`` and returns its exit code: 0, 2 for wrong input, 1 failure, 128 + a signal."""
    plain_log()
    lines, code = [], 0
    try:
        command(_as_text(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        lines, code = [f"error: {line}" for line in str(error).splitlines()], 2
    except errors.RunFailure as error:
        lines, code = [f"error: {error}"], 1
    except errors.Interrupted as error:
        lines, code = [str(error)], error.exit_code
    except KeyboardInterrupt:
        lines, code = ["stopped"], 128 + signal.SIGINT
    with contextlib.suppress(OSError):  # the terminal may be closed
        for line in lines:
            print(line, file=sys.stderr, flush=True)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, also where something would keep it or change the code.

    A reward that hangs keeps its thread, and perhaps threads of its own; a closed terminal cannot take what is left of
    the output.
    """
    rewards = [thread for thread in threading.enumerate() if thread.name == REWARD_THREAD]
    for thread in rewards:
        thread.join(timeout=0.5)
    kept = any(thread.is_alive() for thread in rewards)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            kept = True
    runtime.stop(code)
    if kept:
        os._exit(code)
    sys.exit(code)


def _as_text(argv: Sequence[str]) -> Sequence[str]:
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"received the argument {word[:80]!a}, which is not UTF-8 text; give prompts, names and paths in UTF-8"
            ) from error
    return argv
