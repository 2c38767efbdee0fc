"""Which processes belong together: what each launcher puts into the environment, and what is refused."""

import subprocess
import sys

import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.hosts import environment

EXPLICIT = {"JAX_COORDINATOR_IP": "10.0.0.7", "JAX_COORDINATOR_PORT": "1234", "NNODES": "4", "NODE_RANK": "3"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
JOBSET = {"JOBSET_NAME": "ddpo", "REPLICATED_JOB_NAME": "workers", "JOB_COMPLETION_INDEX": "2", "NNODES": "3"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


TASKS = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


def found(address, count, rank, devices=None):
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": rank}
    return arguments | {"local_device_ids": devices, "cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    "variables, said_by, arguments",
    [
        (EXPLICIT, "JAX_COORDINATOR_IP", found("10.0.0.7:1234", 4, 3)),
        (EXPLICIT | {"JAX_COORDINATOR_IP": "fd00::7"}, "JAX_COORDINATOR_IP", found("[fd00::7]:1234", 4, 3)),
        ({**EXPLICIT, **SKYPILOT, **SLURM}, "JAX_COORDINATOR_IP", found("10.0.0.7:1234", 4, 3)),
        (SKYPILOT, "SKYPILOT_NODE_IPS", found("10.0.0.1:8476", 2, 1)),
        (SKYPILOT | {"JAX_COORDINATOR_PORT": "9"}, "SKYPILOT_NODE_IPS", found("10.0.0.1:9", 2, 1)),
        (JOBSET, "JOBSET_NAME", found("ddpo-workers-0-0.ddpo:8476", 3, 2)),
        (SLURM, "Slurm", found("gpu08:61594", 2, 0)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-3,gpu-7", "SLURM_PROCID": "1"}, "Slurm", found("gpu-3:61594", 2, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[7,9-12]", "JAX_COORDINATOR_PORT": "5"}, "Slurm", found("n7:5", 2, 0)),
        (SLURM | TASKS, "Slurm", found("gpu08:61594", 8, 5, [1])),  # one of four tasks of a node
        (SLURM | TASKS | {"CUDA_VISIBLE_DEVICES": "0"}, "Slurm", found("gpu08:61594", 8, 5)),  # Slurm chose it
    ],
)
def test_launchers(variables, said_by, arguments):
    launch = environment.read(variables)
    assert (launch.said_by, launch.arguments) == (said_by, arguments)
    assert (launch.wait_s, launch.silence_s) == (300, 100)


def test_a_tpu_host_asks_its_machine_unless_it_is_told():
    assert environment.read({}, tpu_host=True).arguments == {}
    assert environment.read(SKYPILOT | SLURM, tpu_host=True).arguments == {}
    assert environment.read(EXPLICIT, tpu_host=True).arguments == found("10.0.0.7:1234", 4, 3)
    assert environment.read({"NNODES": "1"}, tpu_host=True) is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NNODES": "1", "JAX_COORDINATOR_IP": "10.0.0.7"},
        {"NNODES": "1", **SLURM},
        {"NNODES": "4", "NODE_RANK": "0"},  # of some other program: there is no address
        {"SKYPILOT_NODE_IPS": "10.0.0.1\n", "SKYPILOT_NODE_RANK": "0"},
        {"JOB_COMPLETION_INDEX": "2"},  # an indexed Job, not a JobSet
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"},  # in the script or the shell of a job, outside srun
    ],
)
def test_one_process_alone(variables):
    assert environment.read(variables) is None


def test_times():
    launch = environment.read(EXPLICIT | {"DDPO_WAIT_S": "7", "DDPO_SILENCE_S": "9"})
    assert (launch.wait_s, launch.silence_s) == (7, 9)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_COORDINATOR_IP": "10.0.0.7"}, "NNODES: received nothing"),
        ({"JAX_COORDINATOR_IP": "10.0.0.7", "NNODES": "2"}, "NODE_RANK: received nothing"),
        (EXPLICIT | {"NODE_RANK": "4"}, "received rank 4 of 4 processes; ranks are 0 to 3"),
        (EXPLICIT | {"NNODES": "two"}, "NNODES: received 'two'; it must be a whole number of at least 1"),
        (EXPLICIT | {"NODE_RANK": "-1"}, "NODE_RANK: received '-1'; it must be a whole number of at least 0"),
        (EXPLICIT | {"DDPO_WAIT_S": "0"}, "DDPO_WAIT_S: received '0'; it must be a whole number of at least 1"),
        (EXPLICIT | {"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT: received 'http'"),
        (
            EXPLICIT | {"JAX_COORDINATOR_PORT": "65535"},
            "JAX_COORDINATOR_PORT: received 65535; it must be at most",
        ),
        ({"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}, "SKYPILOT_NODE_RANK: received nothing"),
        ({"JOBSET_NAME": "ddpo", "JOB_COMPLETION_INDEX": "0"}, "REPLICATED_JOB_NAME: received nothing"),
    ],
)
def test_what_is_wrong_is_said(variables, message):
    with pytest.raises(InputError) as raised:
        environment.read(variables)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_reading_it_loads_no_jax():
    code = "import sys, ddpo_jax.hosts.environment as e; e.read({}); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
