"""One run at a time in a folder: who is refused, which locks are stale, and what a run notices of its folder."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from waiting import until

from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.workdir import lock
from ddpo_jax.workdir.lock import FILE, Lock


def content(folder):
    return json.loads((folder / FILE).read_text())


def leave(folder, **changes):
    """A lock as a process that was killed leaves it, with some of its words changed."""
    with Lock(folder):
        text = (folder / FILE).read_text()
    (folder / FILE).write_text(json.dumps(json.loads(text) | changes))


@pytest.fixture
def sleeper():
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_by_name_and_the_lock_goes_with_its_owner(tmp_path):
    with Lock(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()
        with pytest.raises(InputError, match="in which another run is going on") as refused, Lock(tmp_path):
            pass
        text = str(refused.value)
        assert text.startswith(f"--workdir: received '{tmp_path}'") and "\n" not in text
        for part in (f"process {os.getpid()} on {content(tmp_path)['host']}", "started 2"):
            assert part in text
        assert content(tmp_path)["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())
    with Lock(tmp_path):
        pass


def test_the_lock_of_a_living_process_holds_and_that_of_a_dead_one_does_not(tmp_path, sleeper):
    leave(tmp_path, pid=sleeper.pid, birth=lock._birth(sleeper.pid))
    with pytest.raises(InputError, match=f"process {sleeper.pid} on"), Lock(tmp_path):
        pass
    sleeper.send_signal(signal.SIGKILL)
    while lock._birth(sleeper.pid):  # killed and not waited for: a zombie, which has ended
        time.sleep(0.01)
    with Lock(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()


def test_a_number_that_was_given_to_another_process_is_no_owner(tmp_path, sleeper):
    leave(tmp_path, pid=sleeper.pid, birth="1")
    with Lock(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("beats", [True, False])
def test_another_machine_is_believed_by_its_signs_of_life(tmp_path, monkeypatch, beats):
    """Its process number means nothing here, and its clock may be wrong: the time of the file is years ago."""
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    leave(tmp_path, machine="elsewhere", host="elsewhere", pid=1)
    os.utime(tmp_path / FILE, (10**9, 10**9))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.2):
            os.utime(tmp_path / FILE, (10**9 + time.monotonic(), 10**9 + time.monotonic()))

    thread = threading.Thread(target=beat)
    if beats:
        thread.start()
        with pytest.raises(InputError, match="process 1 on elsewhere"), Lock(tmp_path):
            pass
        stop.set()
        thread.join()
    else:
        with Lock(tmp_path):
            assert content(tmp_path)["pid"] == os.getpid()


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with Lock(tmp_path):
        before = (tmp_path / FILE).stat().st_mtime_ns
        assert until(lambda: (tmp_path / FILE).stat().st_mtime_ns != before, 30)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": "one"}', "\udcff"])
def test_a_file_that_is_no_lock_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="it is no lock of a run; .* delete this file") as refused, Lock(tmp_path):
        pass
    assert "\n" not in str(refused.value)


RIVAL = """
import pathlib, sys
from ddpo_jax.workdir.lock import Lock
print("ready", flush=True)
for line in sys.stdin:
    try:
        with Lock(pathlib.Path(line.strip())):
            print("took", flush=True)
            sys.stdin.readline()
    except ValueError:
        print("refused", flush=True)
"""


def test_of_two_that_find_a_stale_lock_one_takes_it(tmp_path):
    """Ten times, in processes that start at the same moment; the one that took it holds it until both have said."""
    rivals = [subprocess.Popen([sys.executable, "-c", RIVAL], text=True, stdin=-1, stdout=-1) for _ in range(2)]
    assert [rival.stdout.readline() for rival in rivals] == ["ready\n"] * 2
    for attempt in range(10):
        workdir = tmp_path / str(attempt)
        workdir.mkdir()
        leave(workdir, pid=2**22 + 1, birth="1")
        for rival in rivals:
            rival.stdin.write(f"{workdir}\n")
            rival.stdin.flush()
        said = [rival.stdout.readline() for rival in rivals]
        assert sorted(said) == ["refused\n", "took\n"]
        owner = rivals[said.index("took\n")]
        owner.stdin.write("\n")
        owner.stdin.flush()
    for rival in rivals:
        rival.communicate()


# ---- what a run notices ----


def test_a_folder_that_is_removed_or_renamed_is_noticed(tmp_path):
    for act in (shutil.rmtree, lambda path: path.rename(tmp_path / "elsewhere")):
        workdir = tmp_path / "run"
        workdir.mkdir()
        with Lock(workdir) as held:
            held.check()
            act(workdir)
            with pytest.raises(RunFailure, match=f"{workdir} was removed or renamed while the run went on"):
                held.check()
            workdir.mkdir(exist_ok=True)  # another folder of that name
            with pytest.raises(RunFailure, match="removed or renamed"):
                held.check()
        shutil.rmtree(workdir)


def test_a_lock_that_is_removed_is_written_again_and_one_that_is_taken_ends_the_run(tmp_path, sleeper):
    with Lock(tmp_path) as held:
        (tmp_path / FILE).unlink()
        held.check()
        assert content(tmp_path)["pid"] == os.getpid()
        other = content(tmp_path) | {"pid": sleeper.pid, "birth": lock._birth(sleeper.pid)}
        pathlib.Path(tmp_path / "new").write_text(json.dumps(other))
        os.replace(tmp_path / "new", tmp_path / FILE)
        with pytest.raises(RunFailure, match=f"process {sleeper.pid}"):
            held.check()
    assert content(tmp_path)["pid"] == sleeper.pid  # the owner's, left alone
