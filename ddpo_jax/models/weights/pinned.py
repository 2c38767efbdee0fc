"""Published files pinned by revision and checksum in ``third_party/weights.toml``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tomllib
from pathlib import Path

from ddpo_jax.errors import InputError

PathLike = str | os.PathLike[str]

REGISTRY = Path(__file__).resolve().parents[3] / "third_party" / "weights.toml"


@dataclasses.dataclass(frozen=True)
class Pinned:
    """One entry of `third_party/weights.toml`."""

    name: str
    repo: str
    revision: str
    file: str
    sha256: str
    bytes: int
    format: str
    licence: str
    terms: str


def pinned(name: str, registry: PathLike = REGISTRY) -> Pinned:
    """The registry's entry `name`.

    Raises:
      InputError: there is none; the message lists what there is.
    """
    if not Path(registry).is_file():
        raise InputError(f"{registry}: no such file; pinned weights are listed in the source checkout's third_party/")
    entries = tomllib.loads(Path(registry).read_text(encoding="utf-8"))
    if name not in entries:
        raise InputError(f"weights {name!r} are not in {Path(registry).name}; it holds {', '.join(sorted(entries))}")
    return Pinned(name=name, **entries[name])


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: PathLike, name: str, registry: PathLike = REGISTRY) -> Path:
    """Returns `path` if it is the pinned file `name`, byte for byte.

    Raises:
      InputError: no such file, or size or SHA-256 differ from the registry.
    """
    path, entry = Path(path), pinned(name, registry)
    if not path.is_file():
        raise InputError(f"{path}: no such file; get {entry.file} from {entry.repo} at revision {entry.revision}")
    if path.stat().st_size != entry.bytes:
        raise InputError(f"{path}: {path.stat().st_size} bytes, but {name} has {entry.bytes}; download it again")
    digest = sha256(path)
    if digest != entry.sha256:
        raise InputError(f"{path}: sha256 {digest}, but {name} is pinned to {entry.sha256}; download it again")
    return path
