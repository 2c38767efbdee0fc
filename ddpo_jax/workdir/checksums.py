"""Checksums of the files of a checkpoint: a byte that changed on disk, or a file that is gone, is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from ddpo_jax.errors import InputError, one_line

FILE = "checksums.json"


class Damaged(InputError):
    """A checkpoint cannot be read: part of it is missing, cut short or changed. The message is one line."""


def write(folder: pathlib.Path) -> None:
    """Writes ``checksums.json``: the SHA-256 of every file below ``folder`` by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    with open(folder / FILE, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: pathlib.Path) -> bool:
    """Whether the files are those that were written; False where no checksums are (an earlier version wrote them).

    Raises:
      Damaged: they are not.
    """
    what = f"checkpoint {folder.parent} is damaged"
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise Damaged(f"{what}: {FILE} cannot be read: {one_line(error)}") from error
    try:
        sums = json.loads(text)
        names = sorted(sums.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{what}: {FILE} is not what was written") from error
    for name, wanted in names:
        try:
            found = _checksum(folder / name)
        except (OSError, ValueError) as error:
            raise Damaged(f"{what}: {name} cannot be read: {one_line(error)}") from error
        if found != wanted:
            raise Damaged(f"{what}: {name} is not what was written")
    return True


def _checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
