"""TensorBoard's event files, written in step with the run: what ``add`` wrote is on its way to disk when it returns.

tensorboardX builds the records; its own writer hands them to a thread, which dies when a disk is full and then keeps
the run waiting for ever.
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import sys
import time

import numpy as np
from jaxtyping import UInt8

from ddpo_jax.workdir import files

# tensorboardX imports torch where it is installed, which takes four seconds, and works without: here it is told that
# there is none. A program that has imported torch before keeps it.
_hidden = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
try:
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c
finally:
    if _hidden is None:
        del sys.modules["torch"]

PREFIX = "events.out.tfevents."


class Events:
    """One event file of a run's folder.

    Args:
      folder: of the run; every process adds a file of its own.
      start: first epoch of this process, if not 0: TensorBoard then hides what earlier files have from there on.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        # TensorBoard reads the files in the order of their names, which begin with the time: a clock that was set
        # back, or two starts within a second, must not change that order or overwrite a file.
        stamps = [path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")]
        number = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
        self._path = folder / f"{PREFIX}{number:010d}.{socket.gethostname()}"
        with files.writing(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(Event(file_version="brain.Event:2"))
        if start:
            self._write(Event(step=start, file_version="brain.Event:2"))
            self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers by name."""
        self._write(*(Event(step=step, summary=summary.scalar(name, value)) for name, value in values.items()))

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Adds a picture."""
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self, *events: Event) -> None:
        data = b""
        for event in events:
            event.wall_time = time.time()
            payload = event.SerializeToString()
            length = struct.pack("<Q", len(payload))
            data += length + _checksum(length) + payload + _checksum(payload)
        with files.writing(self._path):
            files.append(self._file, data)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
