"""Checkpoints in a bucket: gcsfs and tensorstore speak to a small Google Cloud Storage on this machine."""

import os
import signal
import subprocess
import sys

import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from waiting import until

from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.workdir import address
from ddpo_jax.workdir.checkpoint import Checkpointer, Damaged

HOME, ROOT = "gs://bucket/runs/one", "runs/one/checkpoints"
LIKE = {"net": {"x": jnp.zeros(1000), "half": jnp.zeros(3, jnp.bfloat16)}, "host": np.zeros(0, np.int64)}


def state(epoch):
    values = jax.random.normal(jax.random.key(epoch), (1000,))
    return {"net": {"x": values, "half": values[:3].astype(jnp.bfloat16)}, "host": np.arange(5) * epoch}


def assert_is(got, epoch):
    assert jax.tree.structure(got) == jax.tree.structure(LIKE)
    for leaf, value in zip(jax.tree.leaves(got), jax.tree.leaves(state(epoch)), strict=True):
        assert leaf.dtype == value.dtype
        np.testing.assert_array_equal(leaf, value)


def save(*epochs, keep=9):
    with Checkpointer(HOME, keep=keep) as checkpointer:
        for epoch in epochs:
            assert checkpointer.save(epoch, state(epoch), 1.0 / epoch)


def saved(bucket):
    """Names of the folders below ``checkpoints``."""
    return sorted({name.removeprefix(f"{ROOT}/").split("/")[0] for name in bucket.under(ROOT)})


def largest(bucket, epoch):
    """Name of the object that has most of the arrays."""
    return max(bucket.under(f"{ROOT}/{epoch}/arrays/d/"), key=lambda name: len(bucket.objects[name]))


def test_round_trip_is_exact_and_what_need_not_be_kept_is_deleted(bucket):
    """The best is the first; of the others the newest is kept. A run below the folder is nobody's leftover."""
    bucket.objects["runs/one/two/checkpoints/7/arrays/manifest.ocdbt"] = b"another's, not complete yet"
    save(1, 2, 3, keep=1)
    assert saved(bucket) == ["1", "3"]
    with Checkpointer(HOME, keep=1) as checkpointer:
        assert (checkpointer.epochs(), checkpointer.best_epoch(), checkpointer.latest_epoch()) == ([1, 3], 1, 3)
        epoch, got = checkpointer.restore(LIKE)
        assert epoch == 3
        assert_is(got, 3)
        assert isinstance(got["host"], np.ndarray) and isinstance(got["net"]["x"], jax.Array)
    with Checkpointer(HOME, read_only=True) as checkpointer:
        np.testing.assert_array_equal(checkpointer.read(1, "net")["x"], state(1)["net"]["x"])
    assert bucket.under("runs/one/two/") and not os.path.exists("gs:")


KILLED = """
import sys
import jax.numpy as jnp
import numpy as np
from ddpo_jax.workdir.checkpoint import Checkpointer

with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(2, {"net": {"x": jnp.ones(1000)}, "host": np.arange(5)}, 0.0)
"""


def test_killed_between_the_arrays_and_the_commit(bucket):
    save(1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, HOME], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill(method, name):
        if method == "PUT" and name == f"{ROOT}/2/commit_success.txt":
            process.send_signal(signal.SIGKILL)
            raise fake_gcs.Refused(503, "never answered")

    bucket.allow = kill
    output, _ = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert f"{ROOT}/2/arrays/checksums.json" in bucket.objects and saved(bucket) == ["1", "2"]
    bucket.allow = lambda method, name: None
    with Checkpointer(HOME) as checkpointer:
        assert checkpointer.epochs() == [1]
        epoch, got = checkpointer.restore(LIKE)
        assert epoch == 1
        assert_is(got, 1)
        assert checkpointer.save(2, state(2), 0.5)
        epoch, got = checkpointer.restore(LIKE)
        assert epoch == 2
        assert_is(got, 2)


@pytest.mark.parametrize("kind", ["a flipped byte", "truncated", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(bucket, log, kind):
    save(1, 2)
    name = largest(bucket, 2)
    content = bytearray(bucket.objects[name])
    content[len(content) // 2] ^= 8
    if kind == "gone":
        del bucket.objects[name]
    else:
        bucket.objects[name] = bytes(content if kind == "a flipped byte" else content[: len(content) // 2])
    before = {name: bucket.objects[name] for name in bucket.under(f"{ROOT}/2/")}
    with Checkpointer(HOME, read_only=True) as checkpointer:
        with pytest.raises(Damaged, match="checkpoints/2 is damaged"):
            checkpointer.read(2, "")
    assert saved(bucket) == ["1", "2"]  # who only reads takes nothing away
    with Checkpointer(HOME) as checkpointer:
        epoch, got = checkpointer.restore(LIKE)
        assert epoch == 1 and checkpointer.epochs() == [1]
        assert_is(got, 1)
        assert len(log) == 1 and f"checkpoint {HOME}/checkpoints/2 is damaged" in log[0]
        assert log[0].endswith("the run goes on from epoch 1")
        assert checkpointer.save(2, state(2), 0.5)
    assert [bucket.objects[name] for name in bucket.under(f"{ROOT}/2.damaged/")] == [*before.values()]
    with Checkpointer(HOME) as checkpointer:
        assert checkpointer.restore(LIKE)[0] == 2 and len(log) == 1
    assert saved(bucket) == ["1", "2", "2.damaged"]


def test_a_bucket_that_does_not_answer_is_no_damage(bucket, log):
    """Nothing is set aside because of a network, and the run does not start anew."""
    save(1, 2)

    def allow(method, name):
        if method == "GET" and name == largest(bucket, 2):
            raise fake_gcs.Refused(403, "no more")

    bucket.allow = allow
    with Checkpointer(HOME) as checkpointer, pytest.raises(InputError, match="cannot be reached") as error:
        checkpointer.restore(LIKE)
    assert "\n" not in str(error.value) and not isinstance(error.value, Damaged)
    assert saved(bucket) == ["1", "2"] and log == []


@pytest.mark.parametrize("what", ["arrays/manifest.ocdbt", "arrays/checksums.json", "commit_success.txt"])
def test_a_save_that_is_refused_is_one_line_and_the_checkpoints_before_stand(bucket, what):
    """Whether tensorstore, this package or orbax writes it."""

    def allow(method, name):
        if method == "PUT" and name == f"{ROOT}/2/{what}":
            raise fake_gcs.Refused(403, "the quota of this project is used up")

    bucket.allow = allow
    with pytest.raises(RunFailure) as error:
        save(1, 2)
    text = str(error.value)
    assert text.startswith(f"a checkpoint cannot be written to {HOME}/checkpoints: ") and "\n" not in text
    assert "the quota of this project is used up" in text and "the same command goes on" in text
    bucket.allow = lambda method, name: None
    with Checkpointer(HOME) as checkpointer:
        epoch, got = checkpointer.restore(LIKE)
    assert epoch == 1 and until(lambda: saved(bucket) == ["1"])  # orbax deletes the half of 2 in another thread
    assert_is(got, 1)


@pytest.mark.parametrize("look", range(1, 7))
def test_what_a_torn_first_save_left_goes_away_while_it_is_looked_at(bucket, look):
    """orbax deletes it in another thread; a bucket without objects has no folders, which is no fault."""
    bucket.objects[f"{ROOT}/1/arrays/torn"] = b"x"
    looks = []

    def allow(method, name):
        if method == "LIST" and name == f"{ROOT}/":
            looks.append(name)
            if len(looks) == look:
                bucket.objects.clear()

    bucket.allow = allow
    with Checkpointer(HOME) as checkpointer:
        assert checkpointer.restore(LIKE) is None
    assert len(looks) >= look
    save(1)
    assert saved(bucket) == ["1"]


def test_who_may_not_look_into_a_bucket_is_told(bucket):
    def allow(method, name):
        raise fake_gcs.Refused(403, "you may not list these objects")

    bucket.allow = allow
    for read_only in (False, True):
        with pytest.raises(InputError, match="you may not list these objects") as error:
            Checkpointer(HOME, read_only=read_only)
        assert "\n" not in str(error.value) and HOME in str(error.value)


def test_without_the_package_one_line_names_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="it needs the package gcsfs, which is not installed; pip install") as error:
        address.folder("gs://bucket/run")
    assert "checkpoint.folder: received 'gs://bucket/run'" in str(error.value)


def test_paths_of_this_machine_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(address.folder("a/../b")) == f"{tmp_path}/a/../b"
    assert os.fspath(address.folder(tmp_path)) == str(tmp_path)
    assert not address.is_address(tmp_path) and address.is_address(epath.Path("gs://bucket/run"))
