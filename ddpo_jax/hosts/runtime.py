"""The start and the end of a run of several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
import threading

from absl import logging

from ddpo_jax.errors import InputError, RunFailure, one_line
from ddpo_jax.hosts import environment

FAREWELL_S = 10.0  # seconds that a process which ends waits for the others to end too


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

    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; workdir.folder has ours
    try:
        jax.distributed.initialize(
            **launch.arguments,
            initialization_timeout=launch.wait_s,
            heartbeat_timeout_seconds=launch.silence_s,
        )
    except ValueError as error:
        if launch.arguments:
            raise InputError(f"{launch.said_by}: JAX cannot make a run of it: {one_line(error)}; correct it") from error
        return 0  # a TPU host that knows of no other
    except Exception as error:  # gRPC's and the network's, in many kinds
        raise RunFailure(_absent(launch, error)) from error
    logging.info("several processes, as %s says: all are there", launch.said_by)
    return jax.process_index()


def _absent(launch: environment.Launch, error: Exception) -> str:
    count, rank = (launch.arguments.get(name, "?") for name in ("num_processes", "process_id"))
    address = launch.arguments.get("coordinator_address", "process 0")
    return (
        f"process {rank} of {count}, as {launch.said_by} says: not all processes were at {address} within "
        f"{launch.wait_s} s ({environment.WAIT}); see that every host is started and can reach that address "
        f"[{one_line(error)[:200]}]"
    )


def stop(code: int) -> None:
    """Ends this process with an exit code if it is one of several, else does nothing.

    It waits a while for the others: where all end, none sees another one vanish.
    """
    if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
        return
    farewell = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(FAREWELL_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal may be closed
            stream.flush()
    os._exit(code)


def _has_tpus() -> bool:
    """Whether JAX will run on TPUs of this machine."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None
