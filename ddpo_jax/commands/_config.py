"""The flags that give a config: ``--config=FILE[:CHOICES]``, ``--config.KEY=VALUE`` and ``--workdir=DIR``."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.config.defaults import FAMILIES, KEYS, ByModel, Computed, Key
from ddpo_jax.config.file import load_file
from ddpo_jax.config.override import override
from ddpo_jax.errors import InputError

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


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line.

    Raises:
      InputError: one line for each flag that is unknown, lacks its value or is missing.
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
        elif flag == "--workdir" and "://" in value:  # which would become a folder "gs:" here
            faults.append(
                f"--workdir: received '{value}'; it is an address, and files are written to folders; give a folder, "
                f"and for the checkpoints --config.checkpoint.folder={value}"
            )
        else:
            values[flag] = value
    if "--config" not in values and not any("--config:" in fault or "is '--config'" in fault for fault in faults):
        faults.append("--config: received nothing; a run needs a config file; write --config=configs/aesthetic.py")
    if faults:
        raise InputError("\n".join(faults))
    file, choices = _file_and_choices(values["--config"])
    return Arguments(file, choices, pathlib.Path(values.get("--workdir", f"runs/{file.stem}")), tuple(overrides))


def load(arguments: Arguments) -> ConfigDict:
    """The config that the file and the overrides describe, not yet resolved.

    Raises:
      InputError: the file cannot be had, or one line for each wrong key or value.
    """
    config = load_file(arguments.file, arguments.choices)
    override(config, arguments.overrides)
    return config


def help_text(doc: str) -> str:
    """The text of a command, then every key with its default and meaning, and the members that can be named."""
    keys = [(f"{key.name}={_default(key)}", key.meaning) for key in KEYS]
    width = max(len(left) for left, _ in keys)
    parts = [doc.strip(), "", "keys and defaults (MINIATURE | STABLE DIFFUSION), besides a member's own options:"]
    parts += [f"  {left:{width}}  {comment}" for left, comment in keys]
    parts += ["", "members, besides your own as package.module (reward, prompts: package.module:function):"]
    parts += [f"  {family}.name: {', '.join(find.available(package))}" for family, package in FAMILIES.items()]
    return "\n".join(parts)


def _default(key: Key) -> str:
    if isinstance(key.default, ByModel):
        return f"{key.default.miniature} | {key.default.stable_diffusion}"
    return "computed" if isinstance(key.default, Computed) else str(key.default)


def _unknown_flag(word: str, flag: str) -> str:
    if not word.startswith("-"):
        return f"{word!r}: not a flag; flags start with --, such as --config=configs/aesthetic.py"
    keys = [f"--config.{key.name}" for key in KEYS]
    by_last_part = {key.rpartition(".")[2]: key for key in keys}
    bare = flag.lstrip("-").rpartition(".")[2]
    meant = find.nearest(flag, [*FLAGS, *keys]) if bare not in by_last_part else by_last_part[bare]
    return f"unknown flag {flag!r}: " + (
        f"nearest is {meant!r}" if meant else f"flags are {', '.join(FLAGS)}; see --help"
    )


def _file_and_choices(text: str) -> tuple[pathlib.Path, str]:
    file, colon, choices = text.partition(".py:")
    return (pathlib.Path(file + ".py"), choices) if colon else (pathlib.Path(text), "")
