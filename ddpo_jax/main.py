"""Trains a diffusion model on a reward.

usage: python -m ddpo_jax.main --config=FILE[:CHOICES] [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=FILE            a config file: a Python file with get_config(), such as configs/aesthetic.py
  --config=FILE:CHOICES    the same with choices, such as configs/aesthetic.py:algorithm=loop,replay=hard
  --workdir=DIR            where the run is kept; default: runs/<name of the config file>
  --config.KEY=VALUE       sets one key (below); --config.KEY VALUE is the same
  --help                   this text

The same command on the same DIR goes on where the run stopped. Exit code: 0 done, 2 wrong input, 1 failure,
130 or 143 interrupted (saved).

examples:
  python -m ddpo_jax.main --config=configs/compressibility.py
  python -m ddpo_jax.main --config=configs/alignment.py:algorithm=ddpo_sf --workdir=runs/sf --config.seed=1
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging as std_logging
import os
import pathlib
import re
import runpy
import sys
import tempfile
import tokenize
import traceback
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import ConfigDict

from ddpo_jax import cli, errors, find
from ddpo_jax import config as configs

FLAGS = ("--config", "--workdir", "--help")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
      file: path of the config file.
      choices: what follows the colon after it; empty if nothing.
      workdir: folder of the run.
      overrides: (key, text) pairs, in order.
    """

    file: pathlib.Path
    choices: str
    workdir: pathlib.Path
    overrides: tuple[tuple[str, str], ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; lines for the user go to stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # rewards and prompts of the user's own, however we were started
    return cli.run(command, argv)


def command(argv: Sequence[str]) -> None:
    """Trains what the command line says.

    Raises:
      ValueError, RunFailure, Interrupted: see ``train``.
    """
    arguments = parse(argv)
    show_log()
    config = prepare(load(arguments))
    make_workdir(arguments.workdir)
    from ddpo_jax.train import train

    train(config, arguments.workdir)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line.

    Raises:
      ValueError: one line for each flag that is unknown, lacks its value or is missing.
    """
    values: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    faults = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--config.")
        if flag not in ("--config", "--workdir") and key == flag:
            faults.append(_unknown_flag(word, flag))
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value, presumably
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                faults.append(f"{flag}: received no value; write {flag}=VALUE")
                continue
            value = rest.pop(0)
        if key != flag:
            overrides.append((key, value))
        elif not value:
            faults.append(f"{flag}: received an empty value; write {flag}=VALUE")
        else:
            values[flag] = value
    if "--config" not in values and not any("--config:" in fault or "is '--config'" in fault for fault in faults):
        faults.append("--config: received nothing; a run needs a config file; write --config=configs/aesthetic.py")
    if faults:
        raise ValueError("\n".join(faults))
    file, choices = _file_and_choices(values["--config"])
    workdir = pathlib.Path(values.get("--workdir", f"runs/{file.stem}")).expanduser()
    return Arguments(file, choices, workdir, tuple(overrides))


def _unknown_flag(word: str, flag: str) -> str:
    if not word.startswith("-"):
        return f"{word!r}: not a flag; flags start with --, such as --config=configs/aesthetic.py"
    keys = [f"--config.{key}" for key, _, _ in documented_keys()]
    by_last_part = {key.rpartition(".")[2]: key for key in keys}
    bare = flag.lstrip("-").rpartition(".")[2]
    meant = find.nearest(flag, [*FLAGS, *keys]) if bare not in by_last_part else by_last_part[bare]
    return f"unknown flag {flag!r}: " + (
        f"nearest is {meant!r}" if meant else f"flags are {', '.join(FLAGS)}; see --help"
    )


def _file_and_choices(text: str) -> tuple[pathlib.Path, str]:
    file, colon, choices = text.partition(".py:")
    return (pathlib.Path(file + ".py"), choices) if colon else (pathlib.Path(text), "")


def load(arguments: Arguments) -> ConfigDict:
    """The config that the file and the overrides describe, not yet resolved.

    Raises:
      ValueError: the file cannot be had, or one line for each wrong key or value.
    """
    config = load_file(arguments.file, arguments.choices)
    configs.override(config, arguments.overrides)
    return config


def load_file(file: pathlib.Path, choices: str) -> ConfigDict:
    """What ``get_config(choices)`` of a config file returns.

    Raises:
      ValueError: in one line, why that is nothing to train with. Lines of ddpo_jax about a key are passed on.
    """
    name = f"--config: received '{file}'"
    if not file.is_file():
        there = "it is a folder" if file.is_dir() else "there is no such file"
        near = find.nearest(file.name, sorted(path.name for path in file.parent.glob("*.py")))
        hint = f"did you mean {file.parent / near}" if near else "give a Python file such as configs/aesthetic.py"
        raise ValueError(f"{name}; {there}; {hint}")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if not callable(get_config):
            raise ValueError(
                f"{name}; it defines no function get_config; write get_config(arg='') that returns a config"
            )
        if choices and not inspect.signature(get_config).parameters:
            raise ValueError(
                f"{name} with choices '{choices}'; its get_config() takes none; leave out what follows '.py:'"
            )
        config = get_config(choices) if choices else get_config()
    except SyntaxError as error:
        raise ValueError(f"{name}; line {error.lineno} is not Python: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a config file is the user's: it may raise anything
        if isinstance(error, ValueError) and errors.raised_here(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"line {lines[-1]}" if lines else "it cannot be read"
        raise ValueError(f"{name}; {where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{name}; get_config returned a {type(config).__name__}; return default_config() with changes")
    return config


def prepare(config: ConfigDict) -> ConfigDict:
    """The config resolved for this machine and found to be valid. Starts JAX.

    Raises:
      ValueError: one line for each fault; or JAX finds no device.
    """
    import jax  # not at the top: wrong flags and --help answer at once

    from ddpo_jax.validate import validate

    cli.use_all_cores()
    cli.cache_compilations()
    try:
        backend, devices = jax.default_backend(), jax.device_count()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a platform it knows but lacks is there
        platforms = os.environ.get("JAX_PLATFORMS", "")
        cause = " ".join(str(error).split()) or "the platform is not installed"
        raise ValueError(f"JAX_PLATFORMS: received {platforms!r}; JAX finds no device: {cause}; use cpu") from error
    resolved = configs.resolve(config, backend, devices)
    validate(resolved, devices)
    chosen = f", chosen for {backend}; --config.model=... takes another" if config.model == "auto" else ""
    logging.info("model %s%s", resolved.model, chosen)
    return resolved


def show_log() -> None:
    """Sends the log of this package, and the warnings of others, to stderr as plain lines."""
    flags.FLAGS.mark_as_parsed()  # absl has no flags of ours; it warns of a log before they are parsed
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.filters = [lambda record: record.levelno >= std_logging.WARNING or _is_ours(record.pathname)]
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)


def _is_ours(file: str) -> bool:
    return errors.PACKAGE in pathlib.Path(file).resolve().parents


def make_workdir(workdir: pathlib.Path, flag: str = "--workdir") -> None:
    """Creates the folder that ``flag`` names if need be, and makes sure that files can be written there.

    Raises:
      ValueError: they cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        why = "it is a file" if workdir.is_file() else error.strerror
        raise ValueError(
            f"{flag}: received '{workdir}'; cannot write there: {why}; give a folder you can write"
        ) from error


def documented_keys() -> list[tuple[str, str, str]]:
    """(key, default as written, comment) of every line of ``default_config`` that sets a key; imports nothing."""
    keys = []
    source = inspect.getsource(configs.default_config)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(source.splitlines(), 1):
        if member := re.match(r'    config\.(\w+) = ConfigDict\(\{"name": (".*?")\}\)', line):
            keys.append((f"{member[1]}.name", member[2], comments.get(number, "")))
        elif (key := re.match(r"    (\w+)\.(\w+) = (.*?)(  #|$)", line)) and "ConfigDict" not in key[3]:
            keys.append((f"{key[1]}.{key[2]}".removeprefix("config."), key[3], comments.get(number, "")))
    return keys


def help_text() -> str:
    """The module's text, then every key with its default and meaning, and the members that can be named."""
    keys = [(f"{key}={default}", comment) for key, default, comment in documented_keys()]
    width = max(len(left) for left, _ in keys)
    parts = [(__doc__ or "").strip(), "", "keys and defaults (None = by model), besides a member's own options:"]
    parts += [f"  {left:{width}}  {comment}" for left, comment in keys]
    parts += ["", "members, besides your own as package.module (reward, prompts: package.module:function):"]
    parts += [f"  {family}.name: {', '.join(find.available(package))}" for family, package in configs.FAMILIES.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
