"""Checksums of the files of a checkpoint: a byte that changed on disk, or a file that is gone, is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

from ddpo_jax.errors import InputError, one_line
from ddpo_jax.workdir import address

FILE = "checksums.json"


class Damaged(InputError):
    """A checkpoint cannot be read: part of it is missing, cut short or changed. The message is one line."""


def write(folder: epath.Path) -> None:
    """Writes ``checksums.json``: the SHA-256 of every file below ``folder`` by its path there."""
    text = json.dumps({name: _checksum(folder / name) for name in sorted(_names(folder))}, indent=1)
    if address.is_address(folder):
        (folder / FILE).write_text(text)
        return
    with open(folder / FILE, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}"


def verify(folder: epath.Path) -> bool:
    """Whether the files are those that were written; False where no checksums are (an earlier version wrote them).

    Raises:
      Damaged: they are not.
      InputError: they are in a bucket that cannot be reached, which says nothing about them.
    """
    what = f"checkpoint {folder.parent} is damaged"
    with _reading(folder, FILE):
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
    try:
        sums = json.loads(text)
        names = sorted(sums.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{what}: {FILE} is not what was written") from error
    for name, wanted in names:
        with _reading(folder, name):
            found = _checksum(folder / name)
        if found != wanted:
            raise Damaged(f"{what}: {name} is not what was written")
    return True


@contextlib.contextmanager
def _reading(folder: epath.Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # gcsfs raises many kinds
        if address.is_address(folder) and not isinstance(error, FileNotFoundError):
            raise InputError(
                f"checkpoint {folder.parent}: {name} cannot be reached: {one_line(error)[:300]}"
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise
        raise Damaged(f"checkpoint {folder.parent} is damaged: {name} cannot be read: {one_line(error)}") from error


def _checksum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
