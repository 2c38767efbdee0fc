"""Config files: a Python file with ``get_config()``, which is the user's own and may be wrong in any way."""

from __future__ import annotations

import inspect
import pathlib
import runpy
import traceback
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.errors import InputError, Interrupted, one_line


def load_file(file: pathlib.Path, choices: str = "") -> ConfigDict:
    """What ``get_config(choices)`` of a config file returns.

    Args:
      file: its path.
      choices: what follows ``.py:`` on the command line; empty calls ``get_config()``.

    Raises:
      InputError: in one line, why that is nothing to train with. Lines of ddpo_jax about a key are passed on.
    """
    name = f"--config: received '{file}'"
    if not _is_file(file, name):
        there = "it is a folder" if file.is_dir() else "there is no such file"
        near = find.nearest(file.name, sorted(path.name for path in file.parent.glob("*.py")))
        hint = f"did you mean {file.parent / near}" if near else "give a Python file such as configs/aesthetic.py"
        raise InputError(f"{name}; {there}; {hint}")
    try:
        config = _call(file, choices, name)
    except (InputError, Interrupted, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        raise InputError(f"{name}; line {error.lineno} is not Python: {error.msg}") from error
    except BaseException as error:  # a config file is the user's: it may raise anything, SystemExit included
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"line {lines[-1]}" if lines else "it cannot be read"
        raise InputError(f"{name}; {where}: {one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{name}; get_config returned a {type(config).__name__}; return default_config() with changes")
    return config


def _is_file(file: pathlib.Path, name: str) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or that holds a null byte
        raise InputError(f"{name}; {one_line(error)}; give a Python file such as configs/aesthetic.py") from error


def _call(file: pathlib.Path, choices: str, name: str) -> Any:
    get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise InputError(f"{name}; it defines no function get_config; write get_config(arg='') that returns a config")
    if choices and not inspect.signature(get_config).parameters:
        raise InputError(f"{name} with choices '{choices}'; its get_config() takes none; leave out what follows '.py:'")
    return get_config(choices) if choices else get_config()
