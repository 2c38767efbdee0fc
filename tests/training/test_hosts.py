"""Runs of several processes on this machine: the numbers of one, checkpoints, signals, and processes that vanish."""

import dataclasses
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest
import tiny
from processes import Starter, free_pair
from waiting import until

from ddpo_jax.types import ScoredSamples
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
    "log.evaluate_every": 1,
    "log.evaluate_images": 8,
    "mesh.data": -1,
}

SECOND_EPOCH = "4"  # the reward's call: after one for the untrained model, two batches of epoch 0 and its evaluation
GONE = "process {} of 2 is gone or cannot be reached"
FIELDS = [field.name for field in dataclasses.fields(ScoredSamples)]


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
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}", "TINY_SHARDED_SIZE": "64"}
    if processes > 1:
        flags |= {"JAX_COORDINATOR_IP": "127.0.0.1", "JAX_COORDINATOR_PORT": str(free_pair())}
        flags |= {"NNODES": str(processes), "DDPO_WAIT_S": "60"}
    return [
        starter.start(argv, **flags, NODE_RANK=str(rank), **(environment or {}).get(rank, {}))
        for rank in range(processes)
        if rank not in absent
    ]


def ended(runs):
    """Their exit codes; None of one that still runs after minutes."""
    until(lambda: None not in [run.poll() for run in runs], 300)
    return [run.poll() for run in runs]


def run(starter, argv, processes):
    """Runs it to its end, which must be a good one."""
    runs = start(starter, argv, processes)
    assert ended(runs) == [0] * processes, "\n\n".join(run.output for run in runs)
    return runs


def rows(workdir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics.read_metrics(workdir)]


def assert_same_rows(workdir, expected):
    """Counts and what the first epoch drew exactly; what was summed over devices, to rounding."""
    found, wanted = rows(workdir), rows(expected)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
    exact = [key for key in wanted[0] if key.split("/")[0] in {"reward", "sample", "replay", "compute"}]
    assert {key: found[0][key] for key in exact} == {key: wanted[0][key] for key in exact}


def assert_close(ours, theirs):
    """The same row to rounding, which every epoch's updates enlarge."""
    for key, value in theirs.items():
        close = 2e-3 if key.startswith("eval/diversity") else 2e-6  # in levels of 255, of which one may tip over
        if key.endswith("/deviations") and value:  # a difference in another unit
            close *= abs(value / theirs[key.replace("deviations", "difference")])
        rel = 2e-4 if theirs["epoch"] < 2 else 1e-3
        assert ours[key] == pytest.approx(value, rel=rel, abs=close), (key, ours["epoch"])


def saved(workdir, epoch=2):
    """The arrays of a checkpoint by name; the replayed samples in the order of their numbers, without fillings."""
    with Checkpointer(workdir, read_only=True) as saver:
        arrays = saver.read(epoch, "state") | {f"replay/{k}": v for k, v in saver.read(epoch, "replay").items()}
    epochs = arrays.pop("replay/epochs")
    order = [row for row in np.argsort(arrays["replay/group_ids"], kind="stable") if epochs[row] >= 0]
    for name in FIELDS:
        shape = arrays.pop(f"replay/{name}_shape", np.zeros(0, int))
        arrays[f"replay/{name}"] = arrays[f"replay/{name}"].reshape(len(epochs), *shape)[order]
    return arrays


def assert_same_state(workdir, expected, epoch=2):
    found, wanted = saved(workdir, epoch), saved(expected, epoch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # One level of one pixel, which rounding may tip over, is 1e-4 of an advantage here.
        tolerance = {"rtol": 1e-3, "atol": 1e-3 if name == "replay/advantages" else 2e-5}
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=name)
        if name.startswith("replay/"):  # before the first update nothing has been rounded
            np.testing.assert_array_equal(found[name][:16], value[:16], err_msg=name)
    np.testing.assert_array_equal(found["replay/latents"][:, 0], wanted["replay/latents"][:, 0])  # the noise
    np.testing.assert_array_equal(found["replay/prompt_ids"], wanted["replay/prompt_ids"])


@pytest.fixture(scope="module")
def alone(starter, command, tmp_path_factory):
    """The folder of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    run(starter, command(workdir), 1)
    return workdir


@pytest.fixture(scope="module")
def pair(starter, command, alone, tmp_path_factory):
    """The folder of a run of two processes, which share the parameters, and what they said."""
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    return workdir, run(starter, command(workdir, **{"mesh.fsdp": 4}), 2)


def test_two_processes_give_the_numbers_of_one(pair, alone):
    workdir, (first, second) = pair
    assert_same_rows(workdir, alone)
    assert_same_state(workdir, alone)
    assert "4 x cpu of 2 processes" in first.output and "epoch 2/2" in first.output
    assert "epoch" not in second.output, second.output
    for name in ("before", "epoch_0000"):
        assert (workdir / f"samples/{name}.png").read_bytes() == (alone / f"samples/{name}.png").read_bytes()
    names = [{path.name.partition(".out.")[0] for path in folder.iterdir()} for folder in (workdir, alone)]
    assert names[0] == names[1]
    assert len(list(workdir.glob("events*"))) == 1


def test_a_reward_that_waits_for_others_is_asked_by_process_0_alone(starter, command, pair, alone, tmp_path):
    calls = {"TINY_CALLS": str(tmp_path / "calls")}
    argv = command(tmp_path / "run", num_epochs=1, **{"reward.name": "tiny_reward:patient"})
    runs = start(starter, argv, 2, environment={0: calls, 1: calls})
    assert ended(runs) == [0, 0], "\n\n".join(run.output for run in runs)
    assert (tmp_path / "calls").read_text() == f"{runs[0].pid} 8\n" * 4  # both batches and both evaluations, whole
    assert_close(rows(tmp_path / "run")[0], rows(alone)[0])


def copied(workdir, folder):
    """A copy of a run, to go on with."""
    return pathlib.Path(shutil.copytree(workdir, folder / workdir.name))


def test_another_number_of_processes_goes_on(starter, command, pair, alone, tmp_path):
    """What two wrote, one goes on with; what one wrote, two. Both then have the numbers of one that went on alone."""
    third = {"num_epochs": 3}
    expected = copied(alone, tmp_path)
    run(starter, command(expected, **third), 1)
    (tmp_path / "other").mkdir()
    for workdir, processes in ((copied(pair[0], tmp_path), 1), (copied(alone, tmp_path / "other"), 2)):
        run(starter, command(workdir, **third), processes)
        assert_same_rows(workdir, expected)
        assert_same_state(workdir, expected, 3)


@pytest.mark.slow
def test_four_processes_write_and_one_or_eight_devices_go_on(starter, command, alone, tmp_path, monkeypatch):
    written = tmp_path / "four"
    run(starter, command(written, **{"mesh.fsdp": 4}), 4)
    assert_same_rows(written, alone)
    assert_same_state(written, alone)
    for devices in (4, 8):
        monkeypatch.setattr(f"{__name__}.DEVICES", devices)
        (tmp_path / str(devices)).mkdir()
        found, expected = (copied(workdir, tmp_path / str(devices)) for workdir in (written, alone))
        for workdir in (found, expected):
            run(starter, command(workdir, num_epochs=3), 1)
        assert_same_rows(found, expected)
        assert_same_state(found, expected, 3)


def test_a_process_that_dies_ends_the_others_and_nothing_is_lost(starter, command, pair, alone, tmp_path):
    """Process 1 is killed in the second epoch: process 0 ends within ten seconds, and says why."""
    workdir = tmp_path / "run"
    first, second = start(starter, command(workdir), 2, environment={1: {"TINY_KILL_AT": SECOND_EPOCH}})
    assert second.wait() == -signal.SIGKILL
    died = time.monotonic()
    assert first.wait(40) == 1
    assert time.monotonic() - died < 10
    assert [line.partition(": see")[0] for line in first.lines()] == [f"error: {GONE.format(1)}"], first.output
    assert [row["epoch"] for row in rows(workdir)] == [0]
    run(starter, command(workdir), 2)
    assert_same_rows(workdir, alone)


def test_a_process_that_dies_ends_others_that_wait_for_their_reward(starter, command, pair, tmp_path):
    """Process 0 is killed while process 1 computes nothing."""
    first, second = start(starter, command(tmp_path / "run"), 2, environment={1: {"TINY_HANG_AT": SECOND_EPOCH}})
    first.wait_for("epoch 1/2")
    first.signal(signal.SIGKILL)
    assert second.wait(10) == 1
    assert [line.partition(": see")[0] for line in second.lines()] == [f"error: {GONE.format(0)}"], second.output


def test_a_signal_to_one_stops_all_after_the_same_epoch(starter, command, pair, tmp_path):
    runs = start(starter, command(tmp_path / "run", num_epochs=500), 2)
    runs[0].wait_for("epoch 1/500")
    runs[1].signal(signal.SIGTERM)
    assert ended(runs) == [128 + signal.SIGTERM] * 2
    last = rows(tmp_path / "run")[-1]["epoch"]
    for each in runs:
        assert re.search(rf"stopped (after epoch {last}|before epoch {last + 1}); the same command", each.output)
    assert (tmp_path / "run" / "checkpoints" / str(last + 1)).is_dir()


def test_what_one_process_fails_at_ends_all(starter, command, pair, tmp_path):
    runs = start(starter, command(tmp_path / "run"), 2, environment={1: {"TINY_FAIL_AT": SECOND_EPOCH}})
    assert ended(runs) == [1, 1]
    for each in runs:
        (line,) = each.lines()
        assert line.startswith("error: epoch 1: process 1: reward 'tiny_reward:reward' raised OSError"), line


def test_processes_started_differently_are_refused(starter, command, pair, tmp_path):
    """The numbers would be of no run at all."""
    variables = {"JAX_COORDINATOR_IP": "127.0.0.1", "JAX_COORDINATOR_PORT": str(free_pair()), "NNODES": "2"}
    variables["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    runs = [starter.start(command(tmp_path / "run", seed=seed), **variables, NODE_RANK=str(seed)) for seed in (0, 1)]
    assert ended(runs) == [2, 2]
    for each in runs:
        (line,) = each.lines()
        assert "process 1 was started with another than process 0" in line and '"seed": 1' in line
    assert not (tmp_path / "run" / "config.json").exists()
