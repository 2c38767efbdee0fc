"""Runs whose checkpoints are elsewhere: on another disk, or in a bucket; and that go on where their folder is gone."""

import os
import shutil
import signal
import types

import fake_gcs
import numpy as np
import pytest
import tiny
import tiny_reward
from processes import Starter, free_pair

from ddpo_jax import main
from ddpo_jax.errors import InputError, Interrupted, RunFailure
from ddpo_jax.training.loop import train
from ddpo_jax.training.trained import read_config, read_params
from ddpo_jax.workdir import elsewhere, metrics

EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run that nothing disturbed, with its checkpoints in it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    go(folder, workdir, "")
    return workdir


@pytest.fixture
def home(request, tmp_path):
    """What ``checkpoint.folder`` is set to: a bucket, or as its parameter says another disk."""
    if hasattr(request, "param"):
        return str(tmp_path / request.param)
    request.getfixturevalue("bucket")
    return "gs://bucket/run"


def go(folder, workdir, home, todo=(), **keys):
    tiny_reward.reset(**dict(todo))
    keys = {"num_epochs": EPOCHS, "reward.name": "tiny_reward:reward", "checkpoint.folder": home} | keys
    train(tiny.tiny_ready(folder, **keys), workdir)


def stopping(images, prompts):
    """Asks the run to stop after the epoch that is scored."""
    os.kill(os.getpid(), signal.SIGTERM)
    return tiny_reward.scores(images, prompts)


def values(workdir):
    """The rows of a run without its times."""
    rows = metrics.read_metrics(workdir)
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same_run(workdir, finished):
    assert values(workdir) == values(finished)
    (epoch, got), (number, wanted) = (read_params(path, read_config(path)) for path in (workdir, finished))
    assert epoch == number == EPOCHS and got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, name)


def test_a_new_machine_goes_on_exactly(folder, finished, home, tmp_path, capsys):
    """The run is stopped in its second epoch, and its folder is gone with the machine."""
    new_machine(folder, finished, home, tmp_path, capsys)


@pytest.mark.parametrize("home", ["disk/run"], indirect=True)
def test_a_disk_that_outlives_the_machine(folder, finished, home, tmp_path, capsys):
    new_machine(folder, finished, home, tmp_path, capsys)


def new_machine(folder, finished, home, tmp_path, capsys):
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped after epoch 1"):
        go(folder, workdir, home, {"at_1": stopping})
    assert len(values(workdir)) == 2 and not (workdir / "checkpoints").exists()
    shutil.rmtree(workdir)

    go(folder, workdir, home)
    assert tiny_reward.calls == 1  # of the last epoch
    assert_same_run(workdir, finished)
    assert not (workdir / "checkpoints").exists()
    there = elsewhere.home(read_config(workdir), workdir)
    for name in ("metrics.jsonl", "config.json"):
        assert (there / name).read_bytes() == (workdir / name).read_bytes()
    assert f"checkpoints/ in {home}" in capsys.readouterr().out

    shutil.rmtree(workdir)
    _, got = read_params(home, read_config(home))  # without a workdir
    for name, value in read_params(finished, read_config(finished))[1].items():
        np.testing.assert_array_equal(got[name], value, name)
    go(folder, workdir, home)  # it is finished, and says so
    assert tiny_reward.calls == 0 and values(workdir) == values(finished) and (workdir / "reward.png").exists()


def test_epochs_between_two_checkpoints_are_not_lost(folder, finished, home, tmp_path):
    """The reward fails in the third epoch: what was held back is saved then, with its rows."""

    def failing(images, prompts):
        raise OSError("no service")

    with pytest.raises(RunFailure, match="no service"):
        go(folder, tmp_path / "run", home, {"at_2": failing}, **{"checkpoint.every": 5})
    shutil.rmtree(tmp_path / "run")
    go(folder, tmp_path / "run", home)
    assert tiny_reward.calls == 1
    assert_same_run(tmp_path / "run", finished)


def test_a_workdir_that_is_taken_away(folder, finished, home, tmp_path):
    """With the state of two epochs held back: the rows of both are gone, so both are trained again."""
    workdir = tmp_path / "run"

    def removing(images, prompts):
        shutil.rmtree(workdir)
        return tiny_reward.scores(images, prompts)

    with pytest.raises(RunFailure, match="was removed"):
        go(folder, workdir, home, {"at_1": removing}, **{"checkpoint.every": 5})
    assert not workdir.exists()
    go(folder, workdir, home)
    assert_same_run(workdir, finished)


def test_of_two_runs_in_one_place_the_earlier_ends(folder, finished, home, tmp_path):
    """While the second epoch of one is scored, the same command is given on another machine."""

    def overtaken(images, prompts):
        there = elsewhere.home(config, tmp_path / "other")
        elsewhere.Copies(there, tmp_path / "other").take()
        return tiny_reward.scores(images, prompts)

    (tmp_path / "other").mkdir()
    config = tiny.tiny_config(folder, **{"checkpoint.folder": home})
    with pytest.raises(RunFailure, match="was taken over by another run: process .*/other; this one ends") as error:
        go(folder, tmp_path / "one", home, {"at_1": overtaken})
    assert "\n" not in str(error.value) and home in str(error.value)
    assert len(values(tmp_path / "other")) == 1  # what was saved until then
    go(folder, tmp_path / "other", home)
    assert tiny_reward.calls == 2
    assert_same_run(tmp_path / "other", finished)


def test_another_run_is_refused_and_a_wrong_folder_starts_none_anew(folder, home, tmp_path):
    go(folder, tmp_path / "run", home, num_epochs=1)
    with pytest.raises(InputError) as error:
        go(folder, tmp_path / "other", home, seed=1)
    assert str(error.value) == (
        f"seed: received 1, but the run in {home} has 0; a run keeps it; use another checkpoint.folder"
    )
    assert not (tmp_path / "other" / "config.json").exists()

    for wrong in ("", f"{home}/wrong"):
        with pytest.raises(InputError, match="where the run in this folder has saved nothing") as error:
            go(folder, tmp_path / "run", wrong)
        assert f"its checkpoints are in {home}/checkpoints; copy them to " in str(error.value)
    assert len(values(tmp_path / "run")) == 1


def test_the_folder_itself_is_as_none(folder, finished, tmp_path):
    go(folder, tmp_path / "run", str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished)
    assert not (tmp_path / "run" / elsewhere.OWNER).exists()


def test_a_bucket_that_is_closed_in_mid_run(folder, finished, home, tmp_path):
    """And is open again for the next command."""

    def closing(images, prompts):
        fake_gcs.bucket().allow = refuse
        return tiny_reward.scores(images, prompts)

    def refuse(method, name):
        raise fake_gcs.Refused(403, "the project has no money any more")

    with pytest.raises(RunFailure, match="a checkpoint cannot be written to gs://bucket/run/checkpoints") as error:
        go(folder, tmp_path / "run", home, {"at_1": closing})
    assert "\n" not in str(error.value) and "the project has no money any more" in str(error.value)
    fake_gcs.bucket().allow = lambda method, name: None
    go(folder, tmp_path / "run", home)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("why", ["nobody answers", "no such bucket", "not allowed"])
def test_a_bucket_that_cannot_be_used_is_one_line(folder, bucket, monkeypatch, tmp_path, capfd, why):
    def refuse(method, name):
        raise fake_gcs.Refused(401, "Anonymous caller does not have storage.objects.get access")

    async def at_once(seconds):
        pass

    if why == "nobody answers":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
        monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=at_once))
    if why == "not allowed":
        bucket.allow = refuse
    task = tmp_path / "task.py"
    task.write_text("from ddpo_jax.config import default_config as get_config\n")
    keys = tiny.settings(folder) | {"reward.name": "tiny_reward:reward"}
    keys["checkpoint.folder"] = "gs://nobucket/run" if why == "no such bucket" else "gs://bucket/run"
    argv = [f"--config={task}", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in keys.items())]
    assert main.main(argv) == 2
    shown = capfd.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: checkpoint.folder: received '{keys['checkpoint.folder']}'; it cannot be used: ")
    assert "Traceback" not in shown
    said = {"nobody answers": "127.0.0.1:9", "no such bucket": "no such bucket", "not allowed": "Anonymous caller"}
    assert said[why] in line


def test_hosts_that_share_no_disk(folder, finished, home, tmp_path):
    """Two processes, each with a folder of its own; after one epoch both folders are gone."""
    task = tmp_path / "task.py"
    task.write_text("from ddpo_jax.config import default_config as get_config\n")
    keys = tiny.settings(folder) | {"reward.name": "tiny_reward:reward", "checkpoint.folder": home}
    with Starter(tmp_path) as starter:
        for epochs in (1, 2):
            port = str(free_pair())
            runs = [
                starter.start(
                    [
                        f"--config={task}",
                        f"--workdir={tmp_path / str(epochs) / str(rank)}",
                        *(f"--config.{key}={value}" for key, value in (keys | {"num_epochs": epochs}).items()),
                    ],
                    XLA_FLAGS="--xla_force_host_platform_device_count=1",
                    **{"JAX_COORDINATOR_IP": "127.0.0.1", "JAX_COORDINATOR_PORT": port, "NNODES": "2"},
                    NODE_RANK=str(rank),
                )
                for rank in (0, 1)
            ]
            assert [run.wait() for run in runs] == [0, 0], "\n\n".join(run.output for run in runs)
    rows, first = metrics.read_metrics(tmp_path / "2" / "0"), metrics.read_metrics(tmp_path / "1" / "0")
    assert len(rows) == 2 and rows[:1] == first  # its times too: it was copied, not trained again
    for ours, theirs in zip(rows, values(finished)[:2], strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], rel=2e-4)
    assert not (tmp_path / "2" / "1" / metrics.FILE).exists()


def test_the_folder_of_a_run_is_no_address(tmp_path, monkeypatch, capsys):
    """It would become a folder ``gs:`` here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text("from ddpo_jax.config import default_config as get_config\n")
    assert main.main(["--config=task.py", "--workdir=gs://bucket/run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --workdir: received 'gs://bucket/run'; it is an address")
    assert line.endswith("--config.checkpoint.folder=gs://bucket/run") and not (tmp_path / "gs:").exists()


@pytest.mark.parametrize("value", ["runs/one", "gs://bucket", "gs://bucket/a*", "s3://bucket/run", "gs://b/../c d"])
def test_a_folder_that_is_none_is_refused(folder, value):
    with pytest.raises(InputError, match=r"^checkpoint.folder: received .*; it must be an absolute path or gs://"):
        tiny.tiny_ready(folder, **{"checkpoint.folder": value})
