"""Checkpoints elsewhere than in the folder of their run: on a disk that outlives the machine, or in a bucket.

``checkpoint.folder`` looks as a run's folder does. Beside ``checkpoints/`` it has what the run needs to go on from a
folder that is new and empty: ``config.json`` and ``metrics.jsonl``, copied before every checkpoint, so that no epoch
is saved which they lack. ``owner.txt`` names the process that writes there: the last that started. Another one which
finds that it is not the owner any more ends.
"""

from __future__ import annotations

import os
import pathlib

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ddpo_jax.errors import RunFailure
from ddpo_jax.workdir import address, files, lock, metrics

OWNER = "owner.txt"
COPIED = ("config.json", metrics.FILE)


def home(config: ConfigDict, workdir: str | os.PathLike[str]) -> epath.Path:
    """The folder that a run's ``checkpoints/`` are in: ``checkpoint.folder``, or its own where that is empty.

    Raises:
      InputError: it is an address, and the package that reads it is not installed.
    """
    return address.folder(os.path.expanduser(config.checkpoint.folder or workdir))


def apart(config: ConfigDict, workdir: str | os.PathLike[str]) -> epath.Path | None:
    """``home``, if it is another folder than the run's own."""
    there = home(config, workdir)
    return None if os.path.realpath(there) == os.path.realpath(os.path.expanduser(workdir)) else there


def has_checkpoints(there: epath.Path) -> bool:
    """Whether a run has saved anything in this folder."""
    folder = there / "checkpoints"
    return address.is_there(folder) and any(path.name.isdecimal() for path in folder.iterdir())


class Copies:
    """What a run keeps beside its checkpoints, where these are elsewhere. For process 0 alone.

    Args:
      there: the folder that the checkpoints are in.
      workdir: folder of the run.
    """

    def __init__(self, there: epath.Path, workdir: pathlib.Path):
        self._there, self._workdir = there, workdir
        self._owner = f"{lock.describe(lock.this_process())}, for {workdir.absolute()}\n".encode()

    def take(self) -> None:
        """Makes the folder this process's, and gives the run its rows of metrics if it has fewer of its own."""
        with address.reaching(self._there):
            self._there.mkdir(parents=True, exist_ok=True)
            address.write(self._there / OWNER, self._owner)
            copied = _read(self._there / metrics.FILE)
        mine = _read(epath.Path(self._workdir / metrics.FILE))
        if copied.count(b"\n") > mine.count(b"\n"):
            logging.info("%s is taken from %s", metrics.FILE, self._there)
            files.write_text(self._workdir / metrics.FILE, copied.decode(errors="replace"))

    def give(self) -> None:
        """Copies the run's config and metrics; to be called before a checkpoint is written.

        Raises:
          RunFailure: another process has made the folder its own; or the metrics are gone, without which the epochs
            since the last checkpoint cannot be kept.
        """
        owner = _read(self._there / OWNER)
        if owner and owner != self._owner:
            who = owner.decode(errors="replace").strip()[:300]
            raise RunFailure(f"{self._there} was taken over by another run: {who}; this one ends, and saves no more")
        for name in COPIED:
            path = self._workdir / name
            if path.exists():
                address.write(self._there / name, path.read_bytes())
            elif name == metrics.FILE:
                raise RunFailure(f"{path} was removed while the run went on")


def _read(path: epath.Path) -> bytes:
    """What is in a file; nothing if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
