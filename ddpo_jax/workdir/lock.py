"""One run at a time in a folder: a file that names the process which writes there."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from absl import logging

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.workdir import files

FILE = "run.lock"
BEAT_S = 5.0  # seconds between the signs of life of an owner
PATIENCE_S = 30.0  # without a sign of life the owner on another machine is taken for dead


class Lock:
    """Holds ``run.lock`` in the folder of a run: host, process and start of its owner.

    A second run is refused. A lock whose owner is gone is taken over: on this machine by looking for the process, on
    another one (a shared disk, a container) by waiting for a sign of life, which every owner gives by touching the
    file. No clock is compared, so none has to be right.

    Args:
      workdir: the folder; made if it does not exist.

    Raises:
      InputError: another run holds the folder; in one line, which.
      RunFailure: the lock cannot be written.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / FILE
        with files.writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(workdir, os.O_RDONLY)
        self._file = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run.lock", daemon=True)

    def __enter__(self) -> Lock:
        try:
            with self._alone():
                self._take()
        except BaseException:
            os.close(self._folder)
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=BEAT_S)
        with contextlib.suppress(OSError):  # wherever the folder is by now
            if os.path.samestat(os.fstat(self._file), os.stat(FILE, dir_fd=self._folder)):
                os.unlink(FILE, dir_fd=self._folder)
        os.close(self._file)
        os.close(self._folder)

    def check(self) -> None:
        """Makes sure that the folder is still there and this run's.

        Raises:
          RunFailure: the folder was removed or renamed, or another run has taken it over.
        """
        if files.is_at(self._file, self._path):
            return
        if not files.is_at(self._folder, self._path.parent):
            raise RunFailure(f"{self._path.parent} was removed or renamed while the run went on")
        try:
            with self._alone():
                self._take()  # only the lock was removed
        except InputError as error:
            raise RunFailure(str(error)) from error

    def _take(self) -> None:
        owner = _owner(self._path)
        if owner is not None:
            who = describe(owner)
            if _lives(owner, self._path):
                raise InputError(
                    f"--workdir: received '{self._path.parent}', in which another run is going on: {who}; wait for its "
                    "end or use another --workdir"
                )
            logging.info("%s, which held this folder, is gone: this run goes on from what it saved", who)
        files.write_json(self._path, this_process())
        before = self._file
        with files.writing(self._path):
            self._file = os.open(self._path, os.O_RDWR)
        if before >= 0:
            os.close(before)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two processes that find the same stale lock take it one after the other."""
        with contextlib.suppress(OSError):  # some network disks cannot lock; then there is no such order
            fcntl.flock(self._folder, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._folder, fcntl.LOCK_UN)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def _owner(path: pathlib.Path) -> dict[str, Any] | None:
    """What a lock says; None if there is none."""
    if not path.exists():
        return None
    expected = {"host": str, "machine": str, "pid": int, "birth": str, "started": str}
    try:
        found = read_json(path)
    except InputError:
        found = {}
    if all(isinstance(found.get(key), kind) for key, kind in expected.items()):
        return found
    raise InputError(f"{path}: it is no lock of a run; if no run is going on in that folder, delete this file")


def _lives(owner: dict[str, Any], path: pathlib.Path) -> bool:
    if owner["machine"] == _machine():
        return _birth(owner["pid"]) == owner["birth"]
    logging.info("waiting %.0f s for a sign of life of the run on %s that holds this folder", PATIENCE_S, owner["host"])
    before, end = path.stat().st_mtime_ns, time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_S / 10))
        with contextlib.suppress(OSError):
            if path.stat().st_mtime_ns != before:
                return True
    return False


def describe(owner: dict[str, Any]) -> str:
    """A process in words."""
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def this_process() -> dict[str, Any]:
    """What a lock says of its owner, here of this process."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    host, pid = socket.gethostname(), os.getpid()
    return {"host": host, "machine": _machine(), "pid": pid, "birth": _birth(pid), "started": now}


def _machine() -> str:
    """What makes a process number mean something: this start of this host, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # there is no /proc outside Linux
        parts += [pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _birth(pid: int) -> str:
    """When a process of this machine started, in its kernel's ticks; empty if it does not live.

    A number is given again to other processes; number and start together are not.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "unknown"
    state, *numbers = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else numbers[18]  # a zombie has ended; field 22 of proc(5) is the start
