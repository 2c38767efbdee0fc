"""The start and the end of a run of several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from absl import logging

from ddpo_jax.errors import InputError, Interrupted, RunFailure, one_line
from ddpo_jax.hosts import environment
from ddpo_jax.hosts.roll_call import RollCall, ended

# Seconds that a process which ends waits for the others to end too: one that is done, for process 0 to draw its curve.
DONE_S, ENDED_S = 300.0, 10.0
_CUT_OFF = re.compile(r"gloo|nccl|connection|unavailable|deadline_exceeded|heartbeat|coordination", re.IGNORECASE)
_roll: RollCall | None = None


def start() -> int:
    """Joins the other processes of the run, if the environment speaks of any; before JAX has looked for devices.

    Returns:
      The number of this process.

    Raises:
      InputError: a variable of the environment is wrong.
      RunFailure: not all processes arrived in time.
    """
    launch = environment.read(os.environ, _has_tpus())
    if launch is None:
        return 0
    import jax

    global _roll
    if launch.address:
        _roll = RollCall(launch.address, launch.processes, launch.rank, launch.wait_s, launch.silence_s)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; workdir.folder has ours
    try:
        jax.distributed.initialize(
            **launch.arguments,
            initialization_timeout=launch.wait_s,
            heartbeat_timeout_seconds=launch.silence_s,
        )
    except ValueError as error:
        if launch.address:
            raise InputError(f"{launch.said_by}: JAX cannot make a run of it: {one_line(error)}; correct it") from error
        return 0  # a TPU host that knows of no other
    except RuntimeError as error:
        raise RunFailure(f"{launch.said_by}: the processes cannot be joined: {one_line(error)}") from error
    sys.excepthook = _end
    logging.info("%d processes, as %s says: all are there", jax.process_count(), launch.said_by)
    return jax.process_index()


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Around what all processes compute together.

    Raises:
      RunFailure: a computation broke off because another process is gone.
    """
    try:
        yield
    except (InputError, RunFailure, Interrupted):
        raise
    except Exception as error:  # JAX raises ValueError and JaxRuntimeError for it
        if _roll is None or not _CUT_OFF.search(str(error)):
            raise
        end = time.monotonic() + 1
        while not _roll.lost and time.monotonic() < end:  # it is heard of at about the same time
            time.sleep(0.05)
        raise RunFailure(ended(_roll.lost or f"a process cannot be reached [{one_line(error)[:200]}]")) from error


def stop(code: int) -> None:
    """Ends this process with an exit code if it is one of several, else does nothing.

    It waits a while for the others: where all end, none sees another one vanish.
    """
    if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
        return
    if _roll is not None:
        _roll.leave()
    if _roll is None or not _roll.lost:
        farewell = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(ENDED_S if code else DONE_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal may be closed
            stream.flush()
    os._exit(code)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a defect of ours: shows it, and ends this process at once, where Python would wait for the others first."""
    sys.__excepthook__(kind, error, trace)
    stop(1)


def _has_tpus() -> bool:
    """Whether JAX will run on TPUs of this machine."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None
