"""Folders that may be in a bucket of Google Cloud Storage: ``gs://BUCKET/FOLDER`` beside the paths of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import logging as std_logging
import os
from collections.abc import Iterator

from etils import epath

from ddpo_jax.errors import InputError, RunFailure, one_line
from ddpo_jax.workdir import files

PathLike = str | os.PathLike[str]


def is_address(path: PathLike) -> bool:
    """Whether this is an address and no path of this machine."""
    return os.fspath(path).startswith("gs://")


def folder(path: PathLike, key: str = "checkpoint.folder") -> epath.Path:
    """The folder that a path or an address names, given as ``key``; both have the methods of ``pathlib``.

    Raises:
      InputError: it is an address, and the package that reads it is not installed.
    """
    if not is_address(path):
        return epath.Path(os.path.join(os.getcwd(), path))
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{key}: received '{path}'; it needs the package gcsfs, which is not installed; "
            "pip install 'ddpo_jax[gcs]', or give a folder"
        )
    import fsspec

    # Orbax writes by another library: what gcsfs remembers of a folder is not what is there.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    std_logging.getLogger("gcsfs").setLevel(std_logging.CRITICAL)  # it logs tracebacks of what we say in one line
    return epath.Path(path)


def is_there(path: epath.Path) -> bool:
    """Whether a folder is there. Of an address ``is_dir`` would say no as well where asking is not allowed."""
    if not is_address(path):
        return path.is_dir()
    try:
        return any(True for _ in path.iterdir())
    except FileNotFoundError:
        return False


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    if is_address(path):
        path.write_bytes(data)  # an object is there when it is complete
    else:
        with files.replacing(path) as temporary:
            temporary.write_bytes(data)


@contextlib.contextmanager
def reaching(path: epath.Path, key: str = "checkpoint.folder") -> Iterator[None]:
    """Around the first use of a folder that ``key`` names: what does not work there becomes one line.

    Raises:
      InputError: there is no such bucket, it cannot be reached, or not by this user.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # gcsfs and what it stands on raise many kinds
        why, fix = one_line(error)[:300], "give a folder you can write"
        if is_address(path):
            why = "there is no such bucket" if isinstance(error, FileNotFoundError) else why
            fix = "log in with `gcloud auth application-default login`, or give a bucket that you may read and write"
        elif not isinstance(error, OSError | RunFailure):
            raise
        raise InputError(f"{key}: received '{path}'; it cannot be used: {why}; {fix}") from error
