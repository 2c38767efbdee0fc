"""Names to modules: ``find("algorithms", "loop")`` is ``ddpo_jax/algorithms/loop.py``; adding one is adding a file.

A name with a dot is the user's own: ``package.module``, or ``package.module:function`` where a function is wanted
(rewards, prompts). It is imported from ``sys.path``, to which ``main.py`` adds the current directory.
"""

from __future__ import annotations

import difflib
import importlib
import pathlib
import re
from typing import Any

from ddpo_jax.errors import InputError

FAMILIES = ("algorithms", "weighting", "replay", "rewards", "prompts")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def available(family: str) -> list[str]:
    """Names of the members of a family, sorted: its files that define ``default_config``. Others are shared helpers.

    Raises:
      InputError: the family does not exist.
    """
    if family not in FAMILIES:
        raise InputError(
            f"there is no family '{family}'.{_hint(family, list(FAMILIES))} Families: {', '.join(FAMILIES)}"
        )
    # Read, not imported: listing the names must not load every member's dependencies.
    files = (pathlib.Path(__file__).parent / family).glob("*.py")
    return sorted(file.stem for file in files if "\ndef default_config(" in file.read_text(encoding="utf-8"))


def find(family: str, name: str) -> Any:
    """The module ``name`` of a family, or the user's own ``package.module`` or function ``package.module:function``.

    Args:
      family: one of ``FAMILIES``.
      name: a member's name, or a dotted path of the user's own.

    Returns:
      The module; the function if ``name`` ends in ``:function``.

    Raises:
      InputError: in one line, what was asked for, why it cannot be had, and what there is.
    """
    if not isinstance(name, str):
        raise InputError(f"{family}: expected a name; received {name!r} ({type(name).__name__})")
    if "." in name or ":" in name:
        return _own(family, name)
    names = available(family)
    if name not in names:
        raise InputError(
            f"{family}: there is no '{name}'.{_hint(name, names)} Available: {', '.join(names)}; "
            "or your own as package.module"
        )
    return importlib.import_module(f"ddpo_jax.{family}.{name}")


def nearest(name: str, names: list[str]) -> str | None:
    """The entry of ``names`` that ``name`` most probably meant, or None if nothing is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _hint(name: str, names: list[str]) -> str:
    meant = nearest(name, names)
    return f" Did you mean '{meant}'?" if meant else ""


def _own(family: str, name: str) -> Any:
    path, colon, attribute = name.partition(":")
    if not _PATH.fullmatch(path) or (colon and not attribute.isidentifier()):
        raise InputError(f"{family}: '{name}' is not of the form package.module or package.module:function")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # the user's module may raise anything at import
        raise InputError(_broken(family, path, error)) from error
    if not colon:
        return module
    if not hasattr(module, attribute):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(
            f"{family}: module '{path}' has no '{attribute}'.{_hint(attribute, functions)} "
            f"It defines: {', '.join(functions) or 'no function'}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"{family}: '{name}' is a {type(function).__name__}; expected a function")
    return function


def _broken(family: str, path: str, error: Exception) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and (path == missing or path.startswith(missing + ".")):
        return (
            f"{family}: there is no module '{missing}' for '{path}'; install it, or run from the folder that holds it"
        )
    cause = " ".join(str(error).split())
    return f"{family}: module '{path}' cannot be imported: {type(error).__name__}: {cause}"
