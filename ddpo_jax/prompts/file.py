"""The lines of a text file: one prompt a line, UTF-8, any line ending; empty lines are skipped."""

from __future__ import annotations

import pathlib

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.prompts import PromptFn, draw


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "path": "",  # the text file, from the current folder
            "shuffle": True,  # True: lines at random; False: every call begins at the first line and goes in order
        }
    )


def read(path: str) -> list[str]:
    """The non-empty lines of a file, stripped.

    Raises:
      InputError: in one line, why there are none.
    """
    fault = f"prompts.path: received {path!r}; "
    if not path:
        raise InputError(f"{fault}prompts.name=file needs a text file with one prompt a line; write prompts.path=FILE")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{fault}{'it is a folder' if file.is_dir() else 'there is no such file'}; give a text file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{fault}byte {error.start} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{fault}it cannot be read: {error.strerror}; give a file you can read") from error
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise InputError(f"{fault}line {number} has a zero byte, so this is no text; save the file as UTF-8")
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{fault}the file has no prompts; write one a line")
    return lines


def make(config: ConfigDict) -> PromptFn:
    """Reads the file once and draws its lines; metadata ``{"line": index among the non-empty lines}``."""
    lines, shuffle = read(config.path), config.shuffle

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, int]]]:
        chosen = draw(rng, len(lines), n) if shuffle else np.arange(n) % len(lines)
        return [lines[index] for index in chosen], [{"line": int(index)} for index in chosen]

    return source
