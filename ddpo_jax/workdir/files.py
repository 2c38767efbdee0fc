"""Files that are written whole or not at all, and places to write that are checked before any work is done."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from ddpo_jax.errors import InputError, RunFailure, one_line

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Around whatever writes ``path``: a full disk, a folder that was removed, a missing permission become one line.

    Raises:
      RunFailure: the block raised ``OSError``.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or one_line(error)
        raise RunFailure(f"cannot write {path}: {why}; mend that, and the same command goes on where it was") from error


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """A temporary path for the block to write; when the block ends well, that file takes the place of ``path``.

    Whoever reads ``path`` sees the old file or the new one, even after a kill or a loss of power; its folder is made if
    need be.

    Raises:
      RunFailure: it cannot be written; ``path`` is as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8, see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: PathLike, content: Any, indent: int = 1) -> None:
    """Writes ``content`` as JSON, ended by a newline, see ``replacing``. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def append(file: int, data: bytes) -> None:
    """Writes all of ``data`` to a file descriptor; a disk that takes only a part of it raises OSError."""
    while data:
        data = data[os.write(file, data) :]


def is_at(file: int, path: PathLike) -> bool:
    """Whether ``path`` still is the file or folder that the descriptor ``file`` was opened from."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def folder_to_write(text: PathLike, flag: str) -> pathlib.Path:
    """The folder that ``flag`` names, made if need be, in which files can be written.

    Raises:
      InputError: they cannot.
    """
    fix = "give a folder you can write"
    with _refusing(text, flag, fix):
        folder = pathlib.Path(text).expanduser()
        if folder.is_file():
            raise InputError(f"{flag}: received '{text}'; cannot write there: a file stands in its place; {fix}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def file_to_write(text: PathLike, flag: str) -> pathlib.Path:
    """The file that ``flag`` names and that can be written or replaced; its folder is made if need be.

    Raises:
      InputError: it cannot, such as a folder or a path below a file.
    """
    fix = "give a file in a folder you can write"
    with _refusing(text, flag, fix):
        path = pathlib.Path(text).expanduser()
        if path.is_dir():
            raise InputError(f"{flag}: received '{text}'; it is a folder; {fix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name[:250]):  # a name too long fails here
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{flag}: received '{text}'; cannot write there: the file is read-only; {fix}")
    return path


@contextlib.contextmanager
def _refusing(text: PathLike, flag: str, fix: str) -> Iterator[None]:
    if "://" in os.fspath(text):
        raise InputError(f"{flag}: received '{text}'; it is an address, and files are written to folders; {fix}")
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name that is too long, no permission
        why = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{flag}: received '{text}'; cannot write there: {why}; {fix}") from error
