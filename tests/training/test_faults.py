"""The table of faults: what may happen to a run, and that nothing is lost by it.

Every test breaks a run of three epochs in one way; the same command then goes on, and what the run has written in the
end is, number for number, what a run has written that nothing disturbed.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time

import numpy as np
import pytest
import tiny
import tiny_reward
from processes import Starter

from ddpo_jax.errors import Interrupted, RunFailure
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import files, lock, metrics

REWARD = {"reward.name": "tiny_reward:reward"}
EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(autouse=True)
def fresh_reward():
    tiny_reward.reset()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    tiny_reward.reset()
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(ready(folder), workdir)
    return workdir


def ready(folder, **keys):
    return tiny.tiny_ready(folder, num_epochs=EPOCHS, **REWARD, **keys)


def values(workdir):
    """The rows of a run without its times."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in metrics.read_metrics(workdir)
    ]


def assert_nothing_is_lost(workdir, finished):
    assert values(workdir) == values(finished)
    for name in ("before", "after", "before_after", *(f"epoch_{epoch:04d}" for epoch in range(EPOCHS))):
        picture = (workdir / "samples" / f"{name}.png").read_bytes()
        assert picture == (finished / "samples" / f"{name}.png").read_bytes(), name
    assert not [path for path in workdir.rglob("*") if path.name.endswith((".tmp", "-tmp")) or path.name == lock.FILE]


def goes_on(folder, workdir, finished):
    """The same command, in this process."""
    tiny_reward.reset()
    train(ready(folder), workdir)
    assert_nothing_is_lost(workdir, finished)


def acting(act):
    """A reward that does something first."""

    def reward(images, prompts):
        act()
        return tiny_reward.scores(images, prompts)

    return reward


# ---- processes of their own: kill -9, signals, rewards that hang, two runs, limits of the system ----


@pytest.fixture(scope="module")
def starter(folder, finished, tmp_path_factory):
    """Needs ``finished``, whose programs every process then finds in the compilation cache."""
    with Starter(tmp_path_factory.mktemp("output")) as starter:
        yield starter


@pytest.fixture
def argv(folder, tmp_path):
    task = tmp_path / "task.py"
    task.write_text("from ddpo_jax.config import default_config as get_config\n")
    changed = tiny.settings(folder) | {"num_epochs": EPOCHS} | REWARD
    return [
        f"--config={task}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{key}={value}" for key, value in changed.items()),
    ]


def kill_at(starter, argv, workdir, seconds):
    """Starts a run and kills it so many seconds after its first row; whether it was still running."""
    run = starter.start(argv)
    while run.poll() is None and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.005)
    time.sleep(seconds)
    run.signal(signal.SIGKILL)
    assert run.wait() in (0, -signal.SIGKILL), run.output
    return run.code != 0


def test_kill_9_inside_an_epoch(starter, folder, finished, tmp_path, argv):
    """While the second epoch is scored and the first may be on its way to disk; the lock it leaves is taken over."""
    run = starter.start(argv, TINY_KILL_AT="1")
    assert run.wait() == -signal.SIGKILL, run.output
    assert values(tmp_path / "run") == values(finished)[:1] and (tmp_path / "run" / lock.FILE).exists()
    again = starter.start(argv)
    assert again.wait() == 0 and again.lines() == [], again.output
    assert f"process {run.pid} on" in again.output and "is gone: this run goes on" in again.output
    assert_nothing_is_lost(tmp_path / "run", finished)


def kill_often(starter, finished, tmp_path, argv, times):
    """Kills so many runs, each at a moment of its own; how many of them had not ended before."""
    rng = np.random.default_rng(times)
    killed = 0
    for attempt in range(times):
        workdir = tmp_path / str(attempt)
        mine = [f"--workdir={workdir}" if word.startswith("--workdir") else word for word in argv]
        killed += kill_at(starter, mine, workdir, rng.uniform(0, 2.5))
        again = starter.start(mine)
        assert again.wait() == 0 and again.lines() == [], again.output
        assert_nothing_is_lost(workdir, finished)
        shutil.rmtree(workdir)
    return killed


def test_kill_9_at_any_moment(starter, finished, tmp_path, argv):
    kill_often(starter, finished, tmp_path, argv, times=2)


@pytest.mark.slow
def test_kill_9_at_fifty_moments(starter, finished, tmp_path, argv):
    killed = kill_often(starter, finished, tmp_path, argv, times=50)
    print(f"{killed} of 50 runs were killed before their end")
    assert killed >= 25


def test_a_second_run_is_refused_and_a_hanging_reward_keeps_nobody(starter, folder, finished, tmp_path, argv):
    """One run hangs in the reward of its second epoch, and with it a thread that would keep a process for ever."""
    first = starter.start(argv, TINY_HANG_AT="1")
    first.wait_for("epoch 1/3")

    second = starter.start(argv)
    assert second.wait() == 2
    (line,) = second.lines()
    assert f"in which another run is going on: process {first.pid} on " in line

    first.signal(signal.SIGTERM)
    first.wait_for(
        "received SIGTERM: saving after this epoch (it waits for reward 'tiny_reward:reward', call 2 (8 images"
    )
    assert first.poll() is None
    first.signal(signal.SIGINT)
    assert first.wait(60) == 130 and first.lines() == []
    last = first.output.splitlines()[-1]
    assert last.startswith(
        "stopped at once while it waited for reward 'tiny_reward:reward', call 2 (8 images, the first"
    )
    assert values(tmp_path / "run") == values(finished)[:1]

    impatient = starter.start([*argv, "--config.reward.wait_s=0.5"], TINY_HANG_AT="0")
    assert impatient.wait() == 1
    (line,) = impatient.lines()
    assert line.startswith(
        "error: epoch 1: reward 'tiny_reward:reward' has not returned from call 1 (8 images, the first"
    )
    assert "after 0.5 s, which is reward.wait_s" in line and line.endswith("the same command goes on from here")
    goes_on(folder, tmp_path / "run", finished)


def test_a_closed_terminal_saves(starter, folder, finished, tmp_path, argv):
    """The run's terminal goes away while the first epoch is scored: there is nobody to write to any more."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    run = starter.start(argv, terminal=os.ttyname(follower), TINY_SLEEP_AT="0")
    shown = ""
    while "sampling" not in shown and select.select([leader], [], [], 300)[0]:
        shown += os.read(leader, 65536).decode(errors="replace")
    os.close(leader)
    os.close(follower)
    assert run.wait() == 128 + signal.SIGHUP, shown
    done = len(values(tmp_path / "run"))
    assert values(tmp_path / "run") == values(finished)[:done] and 1 <= done < EPOCHS
    assert str(done) in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    goes_on(folder, tmp_path / "run", finished)


@pytest.mark.parametrize("limit", [6_000, 30_000])
def test_a_limit_on_the_size_of_files(starter, folder, finished, tmp_path, argv, limit):
    """A picture or an event file does not fit into the smaller one, a checkpoint not into the larger one."""
    run = starter.start(argv, max_file=limit)
    assert run.wait(120) == 1, run.output
    (line,) = run.lines()
    assert "cannot " in line and "File too large" in line and "the same command goes on" in line
    goes_on(folder, tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [16, 40, 64, 80, 100, 120, 140, 160, 200, 240, 300, 360])
def test_a_disk_that_is_full(starter, folder, finished, tmp_path, argv, kilobytes):
    """Of twelve sizes, so that it ends in config.json, a picture, an event, a row, a checkpoint."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        run = starter.start(argv)
        code = run.wait()
        if code:
            (line,) = run.lines()
            print(kilobytes, line)
            assert code in (1, 2) and "No space left on device" in line
        subprocess.run(["mount", "-o", "remount,size=64m", str(workdir)], check=True)
        goes_on(folder, workdir, finished)
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


# ---- in this process ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_during_the_save_is_survived(folder, finished, tmp_path, monkeypatch, number):
    """The first comes while epoch 0 is scored; others at the start of its save and after it, as it goes to disk."""
    from ddpo_jax.training import loop

    saving = loop.save

    def save(*args, **kwargs):
        signal.raise_signal(number)
        saving(*args, **kwargs)
        signal.raise_signal(number)

    monkeypatch.setattr(loop, "save", save)
    tiny_reward.reset(at_0=acting(lambda: os.kill(os.getpid(), number)))
    before = [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(Interrupted, match="stopped after epoch 0") as raised:
        train(ready(folder), tmp_path)
    assert raised.value.exit_code == 128 + number
    assert [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    monkeypatch.undo()
    goes_on(folder, tmp_path, finished)


def damage(checkpoint, kind):
    data = [path for path in checkpoint.rglob("*") if path.is_file() and path.parent.name == "d"]
    for path in data if kind != "flipped" else data[-1:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if kind == "flipped" else content[: len(content) // 2])
        if kind == "half deleted":
            path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "half deleted", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(folder, finished, tmp_path, monkeypatch, kind):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "3", kind)
    said = []
    monkeypatch.setattr("ddpo_jax.workdir.checkpoint.logging.warning", lambda text, *args: said.append(text % args))
    goes_on(folder, tmp_path, finished)
    assert len(said) == 1 and "checkpoints/3" in said[0] and said[0].endswith("goes on from epoch 2")
    assert tiny_reward.calls == 1  # epoch 2 alone


@pytest.mark.parametrize("what", ["row", "picture", "event"])
def test_a_disk_that_is_full_while_it_writes(folder, finished, tmp_path, monkeypatch, what):
    """Half of what epoch 1 writes gets there."""
    append, replacing = files.append, files.replacing

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_append(file, data):
        mine = b'"epoch": 1' in data if what == "row" else b"reward/mean" in data and tiny_reward.calls == 2
        if mine and what != "picture":
            append(file, data[: len(data) // 2])
            full()
        append(file, data)

    @contextlib.contextmanager
    def half_replacing(path):
        with replacing(path) as temporary:
            yield temporary
            if what == "picture" and pathlib.Path(path).name == "epoch_0001.png":
                full()

    monkeypatch.setattr(files, "append", half_append)
    monkeypatch.setattr(files, "replacing", half_replacing)
    with pytest.raises(RunFailure, match="cannot write .*: No space left on device; .* goes on where it was") as raised:
        train(ready(folder), tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    monkeypatch.undo()
    goes_on(folder, tmp_path, finished)


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_is_taken_away(folder, finished, tmp_path, how):
    """While epoch 1 is scored, with the state of epoch 0 not yet on disk; nothing is written where the folder was."""
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    act = (lambda: shutil.rmtree(workdir)) if how == "removed" else (lambda: workdir.rename(elsewhere))
    tiny_reward.reset(at_1=acting(act))
    with pytest.raises(RunFailure) as raised:
        train(ready(folder, **{"checkpoint.every": 5}), workdir)
    assert str(raised.value) == f"{workdir} was removed or renamed while the run went on"
    assert not workdir.exists()
    goes_on(folder, workdir if how == "removed" else elsewhere, finished)


def test_parts_of_the_folder_that_are_taken_away_are_written_again(folder, finished, tmp_path):
    """While epoch 1 is scored; the pictures that were drawn before are what the user threw away."""

    def act():
        while (tmp_path / "checkpoints").exists():  # the first checkpoint may be on its way there
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.rmtree(tmp_path / "samples")
        (tmp_path / "metrics.jsonl").rename(tmp_path / "old.jsonl")
        (tmp_path / lock.FILE).unlink()

    tiny_reward.reset(at_1=acting(act))
    train(ready(folder), tmp_path)
    assert values(tmp_path) == values(finished)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "after.png",
        "epoch_0001.png",
        "epoch_0002.png",
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_clock_that_jumps(folder, finished, tmp_path, monkeypatch, capsys):
    """A day back while epoch 1 is scored, and a year on for the command that goes on."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump[0])
    jump = [0.0]
    signalled = acting(lambda: os.kill(os.getpid(), signal.SIGTERM))

    def back(images, prompts):
        jump[0] = -86400.0
        return signalled(images, prompts)

    tiny_reward.reset(at_1=back)
    with pytest.raises(Interrupted):
        train(ready(folder), tmp_path)
    jump[0] = -2 * 86400.0
    goes_on(folder, tmp_path, finished)
    for row in metrics.read_metrics(tmp_path):
        assert all(0 <= row[key] < 3600 for key in row if key.startswith("time/"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3 and not any(re.search(r" -\d", line) for line in lines)
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [0, 1, 2]
