"""Which processes belong together, read from what a launcher puts into the environment. Loads no JAX.

The first of these that is there decides:

1. ``NNODES=1``: this process is alone, whatever else is set.
2. ``JAX_COORDINATOR_IP`` with ``NNODES`` and ``NODE_RANK`` (``JAX_COORDINATOR_PORT``, 8476 by default; the
   next one is used too): as it says.
3. A TPU host: JAX asks the machine for the other hosts of the slice.
4. SkyPilot: ``SKYPILOT_NODE_IPS`` and ``SKYPILOT_NODE_RANK``.
5. A Kubernetes JobSet: ``JOBSET_NAME``, ``REPLICATED_JOB_NAME``, ``NNODES`` and ``JOB_COMPLETION_INDEX``.
6. Slurm, inside ``srun`` with several tasks: a task of several on a node gets one of its GPUs.

``DDPO_WAIT_S`` (300) is how long a process waits for all others to arrive, ``DDPO_SILENCE_S`` (100) how long one may
give no sign of life before the others end.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ddpo_jax.errors import InputError

PORT = 8476  # of the coordinator, which runs in process 0
WAIT, SILENCE = "DDPO_WAIT_S", "DDPO_SILENCE_S"
WAIT_S, SILENCE_S = 300, 100


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run of several processes.

    Attributes:
      said_by: the variables or the system that says so, for messages.
      address: host and port of the coordinator; empty where JAX finds everything itself.
      processes, rank: how many there are, and the number of this one.
      local_device: the one GPU of this machine that is this process's; None is all.
      wait_s: seconds that a process waits for all others to arrive.
      silence_s: seconds without a sign of life after which a process is taken for dead.
    """

    said_by: str
    address: str = ""
    processes: int = 0
    rank: int = 0
    local_device: int | None = None
    wait_s: int = WAIT_S
    silence_s: int = SILENCE_S

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``jax.distributed.initialize``."""
        if not self.address:
            return {}
        arguments = {"coordinator_address": self.address, "num_processes": self.processes, "process_id": self.rank}
        own = None if self.local_device is None else [self.local_device]
        return arguments | {"local_device_ids": own, "cluster_detection_method": "deactivate"}


def read(environment: Mapping[str, str], tpu_host: bool = False) -> Launch | None:
    """The run that this process is a part of; None if it is alone.

    Args:
      environment: variables.
      tpu_host: whether this machine has TPUs and JAX is to use them.

    Raises:
      InputError: a variable is missing or is not what it should be.
    """
    found = _read(environment, tpu_host)
    if found is None:
        return None
    wait_s = _whole(environment, WAIT, least=1) if WAIT in environment else WAIT_S
    silence_s = _whole(environment, SILENCE, least=1) if SILENCE in environment else SILENCE_S
    return dataclasses.replace(found, wait_s=wait_s, silence_s=silence_s)


def _read(environment: Mapping[str, str], tpu_host: bool) -> Launch | None:
    if environment.get("NNODES") == "1":
        return None
    port = _port(environment, PORT)
    if "JAX_COORDINATOR_IP" in environment:
        return _explicit(
            "JAX_COORDINATOR_IP",
            f"{_host(environment['JAX_COORDINATOR_IP'])}:{port}",
            _whole(environment, "NNODES", least=1),
            _whole(environment, "NODE_RANK"),
        )
    if tpu_host:
        return Launch("the TPU host")
    if "SKYPILOT_NODE_IPS" in environment:
        addresses = environment["SKYPILOT_NODE_IPS"].split()
        address = f"{_host(addresses[0])}:{port}" if addresses else ""
        return _explicit("SKYPILOT_NODE_IPS", address, len(addresses), _whole(environment, "SKYPILOT_NODE_RANK"))
    if "JOBSET_NAME" in environment and "JOB_COMPLETION_INDEX" in environment:
        jobset, job = environment["JOBSET_NAME"], _text(environment, "REPLICATED_JOB_NAME")
        processes, rank = _whole(environment, "NNODES", least=1), _whole(environment, "JOB_COMPLETION_INDEX")
        return _explicit("JOBSET_NAME", f"{jobset}-{job}-0-0.{jobset}:{port}", processes, rank)
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        return _slurm(environment)
    return None


def _slurm(environment: Mapping[str, str]) -> Launch | None:
    port = _port(environment, 61440 + 2 * (_whole(environment, "SLURM_JOB_ID") % 2000))  # jobs may share a node
    address = f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}"
    tasks, nodes = _whole(environment, "SLURM_NTASKS", 1), _whole(environment, "SLURM_STEP_NUM_NODES", 1)
    found = _explicit("Slurm", address, tasks, _whole(environment, "SLURM_PROCID"))
    given_one = len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if found is None or tasks <= nodes or given_one:
        return found
    return dataclasses.replace(found, local_device=_whole(environment, "SLURM_LOCALID"))


def _explicit(said_by: str, address: str, processes: int, rank: int) -> Launch | None:
    if processes <= 1:
        return None
    if rank >= processes:
        raise InputError(f"{said_by}: received rank {rank} of {processes} processes; ranks are 0 to {processes - 1}")
    return Launch(said_by, address, processes, rank)


def _first_node(nodes: str) -> str:
    """The first of ``gpu[08-11,7],other``: ``gpu08``."""
    found = re.match(r"([^,\[]*)(?:\[([^,\-\]]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _host(address: str) -> str:
    """An IPv6 address in brackets, so that a port can follow; anything else as it is."""
    return f"[{address}]" if address.count(":") > 1 and not address.startswith("[") else address


def _port(environment: Mapping[str, str], default: int) -> int:
    name = "JAX_COORDINATOR_PORT"
    port = _whole(environment, name, least=1) if name in environment else default
    if port > 65534:
        raise InputError(f"{name}: received {port}; it must be at most 65534, the next one is used too; use {PORT}")
    return port


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise InputError(f"{name}: received nothing; a run of several processes needs it; set it in each of them")
    return environment[name]


def _whole(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = _text(environment, name)
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < least:
        raise InputError(f"{name}: received {text!r}; it must be a whole number of at least {least}; correct it")
    return int(text)
