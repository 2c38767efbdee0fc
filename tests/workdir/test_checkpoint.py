"""Checkpointer: exact round trips, what is kept, a process killed in mid-save, damaged and foreign folders."""

import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from waiting import until

from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.workdir.checkpoint import Checkpointer, Damaged


class Moments(NamedTuple):  # a custom node, as optax has them
    count: jax.Array
    mu: dict


def arrays(epoch, buffer_length=3):
    rng = np.random.default_rng(epoch)
    return {
        "params": {"a/b": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}},
        "opt_state": (Moments(jnp.int32(epoch), {"x": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}), ()),
        "rng": jax.random.key_data(jax.random.key(epoch)),
        "replay": {
            "latents": rng.normal(size=(buffer_length, 2, 2)).astype(np.float32),
            "prompt_ids": rng.integers(0, 9, buffer_length),
            "rewards": rng.normal(size=buffer_length),
        },
        "queries": np.int64(epoch * 100),
    }


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w)


def test_round_trip_is_exact(tmp_path):
    state = arrays(4, buffer_length=7)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state) is None
        assert checkpointer.save(4, state, reward_mean=0.5)
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got = checkpointer.restore(arrays(0, buffer_length=0))
    assert epoch == 4
    assert_same(got, state)
    assert isinstance(got["replay"]["latents"], np.ndarray)
    assert isinstance(got["params"]["a/b"]["kernel"], jax.Array)


def test_empty_buffer_and_changes_right_after_save(tmp_path):
    state = arrays(1, buffer_length=0)
    state["table"] = np.arange(100_000)
    state["donated"] = jnp.arange(100_000)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, 0.0)
        state["table"][:] = -1  # while the save may still be running
        state["donated"] = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["donated"])
        _, got = checkpointer.restore(state | arrays(9, buffer_length=0))
    assert got["replay"]["latents"].shape == (0, 2, 2)
    assert got["replay"]["rewards"].dtype == np.float64
    np.testing.assert_array_equal(got["table"], np.arange(100_000))
    np.testing.assert_array_equal(got["donated"], np.arange(100_000))


def test_restores_to_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.arange(16.0)}, 0.0)
        like = {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
        got = checkpointer.restore_epoch(1, like)
    assert got["x"].sharding == sharding
    np.testing.assert_array_equal(got["x"], np.arange(16.0))


def test_keeps_the_newest_and_the_best(tmp_path):
    rewards = {1: 0.3, 2: 0.9, 3: -float("inf"), 4: 0.2, 5: 0.4, 6: 0.35}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for epoch, reward in rewards.items():
            assert checkpointer.save(epoch, {"x": jnp.full(2, float(epoch))}, reward)
        checkpointer.wait()
        assert checkpointer.epochs() == [2, 5, 6]
    with Checkpointer(tmp_path, keep=2) as checkpointer:  # the ranking survives a restart
        assert checkpointer.best_epoch() == 2
        assert not checkpointer.save(6, {"x": jnp.zeros(2)}, 0.0, force=True)  # already there: left alone
        got = checkpointer.restore_epoch(checkpointer.best_epoch(), {"x": jnp.zeros(2)})
        assert got["x"].tolist() == [2.0, 2.0]
        checkpointer.save(7, {"x": jnp.zeros(2)}, 0.0)
        checkpointer.wait()
        assert checkpointer.epochs() == [2, 6, 7]
        with pytest.raises(ValueError, match="no epoch 3"):
            checkpointer.restore_epoch(3, {"x": jnp.zeros(2)})


def test_every(tmp_path):
    with Checkpointer(tmp_path, every=3, keep=9) as checkpointer:
        saved = [epoch for epoch in range(1, 8) if checkpointer.save(epoch, {"x": jnp.zeros(1)}, 0.0, epoch == 7)]
        checkpointer.wait()
        assert saved == checkpointer.epochs() == [3, 6, 7]


def test_an_exception_writes_the_epoch_whose_turn_had_not_come(tmp_path):
    """As it was at ``save``, though its buffers were donated and its host arrays changed since."""
    failure = RuntimeError("the loss is not finite")
    with pytest.raises(RuntimeError) as raised, Checkpointer(tmp_path, every=5) as checkpointer:
        for epoch in (1, 2):
            state = arrays(epoch) | {"donated": jnp.full(100_000, epoch), "table": np.full(1000, epoch)}
            assert not checkpointer.save(epoch, state, 0.5)
        jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["donated"])
        state["table"][:] = -1
        raise failure
    assert raised.value is failure
    like = arrays(9) | {"donated": jnp.zeros(100_000, int), "table": np.zeros(0, int)}
    with Checkpointer(tmp_path, every=5) as checkpointer:
        assert checkpointer.epochs() == [2]
        epoch, got = checkpointer.restore(like)
    assert epoch == 2
    assert_same(got, arrays(2) | {"donated": jnp.full(100_000, 2), "table": np.full(1000, 2)})


def test_nothing_is_written_twice_or_without_an_exception(tmp_path):
    with Checkpointer(tmp_path, every=5) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(2)}, 0.0)
    with pytest.raises(KeyError), Checkpointer(tmp_path, every=5) as checkpointer:
        assert checkpointer.epochs() == []
        checkpointer.save(1, {"x": jnp.zeros(2)}, 0.0)
        checkpointer.save(2, {"x": jnp.zeros(2)}, 0.0, force=True)
        raise KeyError
    assert Checkpointer(tmp_path, read_only=True).epochs() == [2]


KILLED = """
import os, pathlib, signal, sys, threading
import jax.numpy as jnp
import numpy as np
from ddpo_jax.workdir.checkpoint import Checkpointer

folder = pathlib.Path(sys.argv[1])
checkpointer = Checkpointer(folder)
checkpointer.save(1, {"x": jnp.ones(3), "big": np.zeros(2)}, 0.0)
checkpointer.wait()

def kill():
    while not any("tmp" in path.name for path in (folder / "checkpoints").iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
checkpointer.save(2, {"x": jnp.zeros(3), "big": np.random.default_rng(0).normal(size=8_000_000)}, 0.0)
checkpointer.wait()
"""


def test_killed_in_mid_save(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    leftovers = [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
    assert leftovers, "the process was not killed in mid-save"
    like = {"x": jnp.zeros(3), "big": np.zeros(0)}
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got = checkpointer.restore(like)
        assert (epoch, got["x"].tolist()) == (1, [1.0, 1.0, 1.0])
        checkpointer.save(2, {"x": jnp.full(3, 2.0), "big": np.zeros(5)}, 0.0)  # the same number again
        epoch, got = checkpointer.restore(like)
        assert (epoch, got["x"].tolist(), got["big"].shape) == (2, [2.0] * 3, (5,))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]


def test_another_configuration_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros((2, 3)), "old": jnp.zeros(1), "host": np.zeros((5, 2))}, 0.0)
        like = {"x": jnp.zeros((2, 4)), "new": jnp.zeros(1), "host": np.zeros((0, 3))}
        with pytest.raises(ValueError) as error:
            checkpointer.restore(like)
    message = str(error.value)
    assert "\n" not in message
    for part in ("missing: new", "unexpected: old", "x: stored float32[2, 3], expected float32[2, 4]", "host: stored"):
        assert part in message


def test_what_was_an_empty_buffer_is_one_and_what_was_none_is_missing(tmp_path):
    state = arrays(1, buffer_length=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, 0.0)
        _, got = checkpointer.restore(arrays(2, buffer_length=0))
        assert_same(got, state)
        with pytest.raises(InputError, match="missing: replay/latents"):
            checkpointer.restore(arrays(2, buffer_length=3))


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """It has an item ``meta`` and no checksums."""
    manager = ocp.CheckpointManager(
        tmp_path / "checkpoints",
        options=ocp.CheckpointManagerOptions(best_fn=lambda found: found["reward_mean"]),
        item_handlers={"arrays": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
    )
    meta = {"meta": {}, "empty": {"host": [[0, 2], "float32"]}}
    saved = ocp.args.Composite(arrays=ocp.args.PyTreeSave({"x": jnp.arange(4.0)}), meta=ocp.args.JsonSave(meta))
    manager.save(3, args=saved, metrics={"reward_mean": 0.5})
    manager.close()
    like = {"x": jnp.zeros(4), "host": np.zeros((0, 2), np.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got = checkpointer.restore(like)
        assert (epoch, got["x"].tolist(), got["host"].shape) == (3, [0, 1, 2, 3], (0, 2))
        assert checkpointer.save(4, like, 0.1)
    with Checkpointer(tmp_path) as checkpointer:
        assert (checkpointer.epochs(), checkpointer.best_epoch()) == ([3, 4], 3)


# ---- damage ----

LIKE = {"x": jnp.zeros(1000), "host": np.zeros(0, np.int64)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        for epoch in (1, 2):
            values = jax.random.normal(jax.random.key(epoch), (1000,))
            checkpointer.save(epoch, {"x": values, "host": np.arange(5) * epoch}, epoch)
    return folder


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << 3
    path.write_bytes(data)


def damage(folder, kind):
    data = [path for path in files_of(folder) if "arrays" in path.parts and path.parent.name == "d"]
    if kind == "truncated":
        for path in data:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "a flipped byte":
        flip(max(data, key=lambda path: path.stat().st_size), 0.5)
    elif kind == "half deleted":
        for path in files_of(folder)[::2]:
            path.unlink()
    elif kind == "emptied":
        for path in files_of(folder):
            path.write_bytes(b"")
    elif kind == "no arrays":
        shutil.rmtree(folder / "arrays")
    elif kind == "foreign":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "model.bin").write_bytes(b"someone else's")
    elif kind == "checksums":
        (folder / "arrays" / "checksums.json").write_text("[" * 5000)


KINDS = ["truncated", "a flipped byte", "half deleted", "emptied", "no arrays", "foreign", "checksums"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, tmp_path, log, kind):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "2", kind)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:  # who only reads takes nothing away
        with pytest.raises(Damaged, match="checkpoints/2"):
            checkpointer.read(2, "")
    before = {path: path.read_bytes() for path in files_of(tmp_path / "checkpoints" / "2")}
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got = checkpointer.restore(LIKE)
        assert epoch == 1 and got["host"].tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(got["x"], jax.random.normal(jax.random.key(1), (1000,)))
        assert len(log) == 1 and "checkpoints/2" in log[0] and log[0].endswith("the run goes on from epoch 1")
        assert checkpointer.epochs() == [1]
        assert checkpointer.save(2, got, 0.5)
    kept = {path: path.read_bytes() for path in files_of(tmp_path / "checkpoints" / "2.damaged")}
    assert [*kept.values()] == [*before.values()]  # nothing is deleted
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(LIKE)[0] == 2 and len(log) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_are_damaged_nothing_is_touched_and_one_line_says_what_to_do(saved, tmp_path, log, kind):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for number in (1, 2):
        damage(tmp_path / "checkpoints" / str(number), kind)
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(InputError) as error:
        checkpointer.restore(LIKE)
    text = str(error.value)
    assert "\n" not in text and "checkpoints/2" in text and "of all there are (2, 1) none can be read" in text
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before and log == []


def test_every_byte_that_matters_is_watched(saved, tmp_path, log):
    """Whichever file of the newest checkpoint is damaged at whichever place: what is restored is right."""
    for number, victim in enumerate(files_of(saved / "checkpoints" / "2")):
        for kind in ("flipped", "truncated", "gone"):
            workdir = tmp_path / f"{number}{kind}"
            shutil.copytree(saved, workdir)
            path = workdir / victim.relative_to(saved)
            if kind == "flipped" and victim.stat().st_size:
                flip(path, (number * 0.37) % 1)
            elif kind == "truncated":
                path.write_bytes(path.read_bytes()[: victim.stat().st_size // 2])
            else:
                path.unlink()
            with Checkpointer(workdir) as checkpointer:
                epoch, got = checkpointer.restore(LIKE)
            assert epoch == 1 or "arrays" not in victim.parts or "commit" in victim.name, victim
            np.testing.assert_array_equal(got["x"], jax.random.normal(jax.random.key(epoch), (1000,)), str(victim))
            assert got["host"].tolist() == (np.arange(5) * epoch).tolist()


# ---- folders that change, and disks that are full ----


def test_a_folder_of_checkpoints_that_was_removed_is_made_again(tmp_path, log):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, LIKE, 0.0)
        checkpointer.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        assert checkpointer.save(2, LIKE, 0.0)
        checkpointer.wait()
        assert len(log) == 1 and "was removed while the run went on" in log[0]
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
        assert checkpointer.save(3, LIKE, 0.0)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.epochs() == [3]
        assert checkpointer.restore(LIKE)[0] == 3


def test_a_run_whose_folder_was_removed_does_not_make_it_again(tmp_path, log):
    workdir = tmp_path / "run"
    with pytest.raises(RunFailure, match="was removed or renamed") as error, Checkpointer(workdir, every=5) as saver:
        saver.save(1, LIKE, 0.0)
        shutil.rmtree(workdir)
        saver.save(2, LIKE, 0.0, force=True)
    assert "\n" not in str(error.value) and not workdir.exists()


def test_a_file_that_cannot_be_written_is_one_line_and_the_checkpoints_before_stand(tmp_path):
    """The operating system refuses files above 64 kB; the state of epoch 2 is larger."""
    code = SMALL_FILES.format(limit=64 * 1024)
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert (
        process.stdout.startswith("RunFailure a checkpoint cannot be written to ")
        and "File too large" in process.stdout
    )
    assert process.stdout.count("\n") == 1 and process.returncode == 0, process
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got = checkpointer.restore({"x": np.zeros(0)})
        assert (epoch, got["x"].shape, checkpointer.epochs()) == (1, (5,), [1])
    # orbax deletes the half of it in another thread
    assert until(lambda: [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"])


SMALL_FILES = """
import resource, sys
import numpy as np
from ddpo_jax.errors import RunFailure
from ddpo_jax.workdir.checkpoint import Checkpointer

resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, {{"x": np.zeros(5)}}, 0.0)
        checkpointer.save(2, {{"x": np.random.default_rng(0).normal(size=1_000_000)}}, 0.0)
except RunFailure as error:
    print("RunFailure", error)
"""


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(ValueError, match="cannot make the folder"):
        Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.keep: received 0"):
        Checkpointer(tmp_path, keep=0)
