"""The published files that this package can read: ``catalogue.toml`` beside this file, a copy of which is
``third_party/weights.toml``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpo_jax import find
from ddpo_jax.errors import InputError, one_line

PathLike = str | os.PathLike[str]

CATALOGUE = Path(__file__).with_name("catalogue.toml")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published file; ``catalogue.toml`` says what the fields mean."""

    name: str
    used_by: str
    host: str
    repo: str
    revision: str
    file: str
    sha256: str
    bytes: int
    format: str
    licence: str
    terms: str

    @property
    def pinned(self) -> bool:
        """Whether its checksum is known."""
        return self.sha256 != ""


@functools.cache
def entries() -> Mapping[str, Entry]:
    """Every entry by its name, in the order of the file."""
    tables = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **table) for name, table in tables.items()}


def entry(name: str) -> Entry:
    """The entry ``name``.

    Raises:
      InputError: there is none; the message lists what there is.
    """
    known = entries()
    if name not in known:
        near = find.nearest(name, list(known))
        meant = f"did you mean {near}? " if near else ""
        raise InputError(f"weights: received {name!r}; {meant}it must be one of {', '.join(known)}")
    return known[name]


# --- verifying --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this package keeps what it can make again: ``~/.cache/ddpo_jax``."""
    return Path.home() / ".cache" / "ddpo_jax"


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: PathLike, name: str, *, again: bool = False) -> Path:
    """Returns ``path`` if it is the file ``name`` of the catalogue, byte for byte; if that one is pinned, else anyway.

    A checksum is computed once for a file of the same size and time of change, and remembered in the cache folder.

    Args:
      path: of the file.
      name: of the entry.
      again: compute the checksum even if it is remembered.

    Raises:
      InputError: no such file, or size or SHA-256 differ from the catalogue.
    """
    path, wanted = Path(path), entry(name)
    try:
        size = path.stat().st_size
        if wanted.pinned and size != wanted.bytes:
            raise InputError(f"{path}: it has {size} bytes; {name} has {wanted.bytes}; {_fix(wanted)}")
        digest = _remembered_sha256(path, again) if wanted.pinned else ""
    except OSError as error:
        raise InputError(f"{path}: it cannot be read: {one_line(error)}; {_fix(wanted)}") from error
    if digest != wanted.sha256:
        raise InputError(f"{path}: its sha256 is {digest}; that of {name} is {wanted.sha256}; {_fix(wanted)}")
    return path


def is_verified(path: Path, name: str) -> bool:
    """Whether ``verify`` has found this very file right before; nothing is computed."""
    wanted = entry(name)
    return wanted.pinned and _memory().get(_key(path)) == wanted.sha256


def _fix(wanted: Entry) -> str:
    at = f" at revision {wanted.revision}" if wanted.revision else ""
    return f"delete it and get {wanted.file} of {wanted.repo}{at} again"


def _remembered_sha256(path: Path, again: bool) -> str:
    memory, key = _memory(), _key(path)
    if again or key not in memory:
        memory[key] = sha256(path)
        _remember(memory)
    return memory[key]


def _key(path: Path) -> str:
    found = path.resolve()
    status = found.stat()
    return f"{found}|{status.st_size}|{status.st_mtime_ns}"


def _memory_file() -> Path:
    return cache_folder() / "verified.json"


def _memory() -> dict[str, Any]:
    try:
        memory = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none yet, or damaged: the files are hashed again
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(memory: Mapping[str, Any]) -> None:
    file = _memory_file()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(memory, indent=1), encoding="utf-8")
        os.replace(partial, file)
    except OSError:  # no home, no room: the next start computes them again
        with contextlib.suppress(OSError):
            partial.unlink()
