"""Runs of several processes on this machine: the numbers of one process, checkpoints, signals, and hosts that vanish."""

import contextlib
import json
import signal
import socket
import time

import numpy as np
import pytest
import tiny
from processes import Starter

from ddpo_jax.workdir import metrics
from ddpo_jax.workdir.checkpoint import Checkpointer

DEVICES = 4  # of every run here, however many processes share them
SETTINGS = {
    "num_epochs": 2,
    "reward.name": "tiny_reward:reward",
    "sample.num_batches_per_epoch": 2,
    "replay.name": "hard",
    "replay.k": 1,
    "checkpoint.every": 1,
    "mesh.data": -1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    with Starter(tmp_path_factory.mktemp("output")) as starter:
        yield starter


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    """``command(workdir, key=value)``: the arguments of a run."""
    task = tmp_path_factory.mktemp("task") / "task.py"
    task.write_text("from ddpo_jax.config import default_config as get_config\n")

    def arguments(workdir, **keys):
        changed = tiny.settings(folder) | SETTINGS | keys
        return [f"--config={task}", f"--workdir={workdir}", *(f"--config.{key}={v}" for key, v in changed.items())]

    return arguments


def start(starter, argv, processes, absent=(), environment=None):
    """Starts the processes of a run that share ``DEVICES`` devices; ``environment`` by number, for some of them."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}"}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags |= {"JAX_COORDINATOR_IP": "127.0.0.1", "JAX_COORDINATOR_PORT": str(port), "NNODES": str(processes)}
    return [
        starter.start(argv, **flags, NODE_RANK=str(rank), **(environment or {}).get(rank, {}))
        for rank in range(processes)
        if rank not in absent
    ]


def run(starter, argv, processes):
    """Runs it to its end, which must be a good one."""
    runs = start(starter, argv, processes)
    assert [run.wait(120) for run in runs] == [0] * processes, "\n\n".join(run.output for run in runs)
    return runs


def rows(workdir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics.read_metrics(workdir)]


def assert_same_rows(workdir, expected):
    """Counts and what the first epoch drew exactly; what was summed over devices, to rounding."""
    found, wanted = rows(workdir), rows(expected)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-6), (key, ours["epoch"])
    exact = [key for key in wanted[0] if key.split("/")[0] in {"reward", "sample", "replay", "compute"}]
    assert {key: found[0][key] for key in exact} == {key: wanted[0][key] for key in exact}


def saved(workdir, epoch=2):
    """The arrays of a checkpoint by name; the replayed samples in the order of their numbers, without fillings."""
    with Checkpointer(workdir, read_only=True) as saver:
        arrays = saver.read(epoch, "state") | {f"replay/{k}": v for k, v in saver.read(epoch, "replay").items()}
    epochs, groups = arrays.pop("replay/epochs"), arrays["replay/group_ids"]
    order = [i for i in np.lexsort([np.arange(len(groups)), groups]) if epochs[i] >= 0]
    for name in ("latents", "log_prob", "context", "rewards", "advantages", "prompt_ids", "group_ids", "weights"):
        array = arrays[f"replay/{name}"]
        arrays[f"replay/{name}"] = array.reshape(len(epochs), *arrays[f"replay/{name}_shape"])[order]
    return arrays


def assert_same_state(workdir, expected, epoch=2):
    found, wanted = saved(workdir, epoch), saved(expected, epoch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith("_ids"):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
    first = len(wanted["replay/latents"]) // 2  # the first epoch: no update has rounded yet
    np.testing.assert_array_equal(found["replay/latents"][:first, 0], wanted["replay/latents"][:first, 0])


@pytest.fixture(scope="module")
def alone(starter, command, tmp_path_factory):
    """The folder of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    run(starter, command(workdir), 1)
    return workdir


@pytest.fixture(scope="module")
def pair(starter, command, alone, tmp_path_factory):
    """The folder of a run of two processes, and what they said."""
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    return workdir, run(starter, command(workdir), 2)


def test_two_processes_give_the_numbers_of_one(pair, alone):
    workdir, (first, second) = pair
    assert_same_rows(workdir, alone)
    assert_same_state(workdir, alone)
    assert "4 x cpu of 2 processes" in first.output and "epoch 2/2" in first.output
    assert "epoch" not in second.output, second.output
    for name in ("before", "epoch_0000"):
        assert (workdir / f"samples/{name}.png").read_bytes() == (alone / f"samples/{name}.png").read_bytes()
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()} | {
        path.name for path in workdir.glob("events*")
    } - {path.name for path in alone.glob("events*")}
