"""Checkpointer: exact round trips, what is kept, a process killed in mid-save, damaged and foreign folders."""

import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpo_jax.workdir.checkpoint import Checkpointer


class Moments(NamedTuple):  # a custom node, as optax has them
    count: jax.Array
    mu: dict


def arrays(epoch, buffer_length=3):
    rng = np.random.default_rng(epoch)
    return {
        "params": {"a/b": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}},
        "opt_state": (Moments(jnp.int32(epoch), {"x": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}), ()),
        "rng": jax.random.split(jax.random.key(epoch), 2),
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
        if jax.dtypes.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        np.testing.assert_array_equal(g, w)


def test_round_trip_is_exact(tmp_path):
    state = arrays(4, buffer_length=7)
    meta = {"statistics": {"a red circle": [0.1, -2.5e-7]}, "nested": [1, None, "ü"]}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state) is None
        assert checkpointer.save(4, state, meta, reward_mean=0.5)
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got, got_meta = checkpointer.restore(arrays(0, buffer_length=0))
    assert epoch == 4
    assert got_meta == meta
    assert_same(got, state)
    assert isinstance(got["replay"]["latents"], np.ndarray)
    assert isinstance(got["params"]["a/b"]["kernel"], jax.Array)


def test_empty_buffer_and_changes_right_after_save(tmp_path):
    state = arrays(1, buffer_length=0)
    state["table"] = np.arange(100_000)
    state["donated"] = jnp.arange(100_000)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, 0.0)
        state["table"][:] = -1  # while the save may still be running
        state["donated"] = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["donated"])
        _, got, _ = checkpointer.restore(state | arrays(9))
    assert got["replay"]["latents"].shape == (0, 2, 2)
    assert got["replay"]["rewards"].dtype == np.float64
    np.testing.assert_array_equal(got["table"], np.arange(100_000))
    np.testing.assert_array_equal(got["donated"], np.arange(100_000))


def test_restores_to_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.arange(16.0)}, {}, 0.0)
        like = {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
        got, _ = checkpointer.restore_epoch(1, like)
    assert got["x"].sharding == sharding
    np.testing.assert_array_equal(got["x"], np.arange(16.0))


def test_keeps_the_newest_and_the_best(tmp_path):
    rewards = {1: 0.3, 2: 0.9, 3: -float("inf"), 4: 0.2, 5: 0.4, 6: 0.35}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for epoch, reward in rewards.items():
            assert checkpointer.save(epoch, {"x": jnp.full(2, float(epoch))}, {"epoch": epoch}, reward)
        checkpointer.wait()
        assert checkpointer.epochs() == [2, 5, 6]
    with Checkpointer(tmp_path, keep=2) as checkpointer:  # the ranking survives a restart
        assert checkpointer.best_epoch() == 2
        assert not checkpointer.save(6, {"x": jnp.zeros(2)}, {}, 0.0, force=True)  # already there: left alone
        got, meta = checkpointer.restore_epoch(checkpointer.best_epoch(), {"x": jnp.zeros(2)})
        assert (meta["epoch"], got["x"].tolist()) == (2, [2.0, 2.0])
        checkpointer.save(7, {"x": jnp.zeros(2)}, {}, 0.0)
        checkpointer.wait()
        assert checkpointer.epochs() == [2, 6, 7]
        with pytest.raises(ValueError, match="no epoch 3"):
            checkpointer.restore_epoch(3, {"x": jnp.zeros(2)})


def test_every(tmp_path):
    with Checkpointer(tmp_path, every=3, keep=9) as checkpointer:
        saved = [epoch for epoch in range(1, 8) if checkpointer.save(epoch, {"x": jnp.zeros(1)}, {}, 0.0, epoch == 7)]
        checkpointer.wait()
        assert saved == checkpointer.epochs() == [3, 6, 7]


def test_an_exception_writes_the_epoch_whose_turn_had_not_come(tmp_path):
    """As it was at ``save``, though its buffers were donated and its host arrays changed since."""
    failure = RuntimeError("the loss is not finite")
    with pytest.raises(RuntimeError) as raised, Checkpointer(tmp_path, every=5) as checkpointer:
        for epoch in (1, 2):
            state = arrays(epoch) | {"donated": jnp.full(100_000, epoch), "table": np.full(1000, epoch)}
            assert not checkpointer.save(epoch, state, {"n": epoch}, 0.5)
        jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["donated"])
        state["table"][:] = -1
        raise failure
    assert raised.value is failure
    like = arrays(9) | {"donated": jnp.zeros(100_000, int), "table": np.zeros(0, int)}
    with Checkpointer(tmp_path, every=5) as checkpointer:
        assert checkpointer.epochs() == [2]
        epoch, got, meta = checkpointer.restore(like)
    assert (epoch, meta) == (2, {"n": 2})
    assert_same(got, arrays(2) | {"donated": jnp.full(100_000, 2), "table": np.full(1000, 2)})


def test_nothing_is_written_twice_or_without_an_exception(tmp_path):
    with Checkpointer(tmp_path, every=5) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(2)}, {}, 0.0)
    with pytest.raises(KeyError), Checkpointer(tmp_path, every=5) as checkpointer:
        assert checkpointer.epochs() == []
        checkpointer.save(1, {"x": jnp.zeros(2)}, {}, 0.0)
        checkpointer.save(2, {"x": jnp.zeros(2)}, {}, 0.0, force=True)
        raise KeyError
    assert Checkpointer(tmp_path, read_only=True).epochs() == [2]


KILLED = """
import os, pathlib, signal, sys, threading
import jax.numpy as jnp
import numpy as np
from ddpo_jax.checkpoint import Checkpointer

folder = pathlib.Path(sys.argv[1])
checkpointer = Checkpointer(folder)
checkpointer.save(1, {"x": jnp.ones(3), "big": np.zeros(2)}, {"n": 1}, 0.0)
checkpointer.wait()

def kill():
    while not any("tmp" in path.name for path in (folder / "checkpoints").iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
checkpointer.save(2, {"x": jnp.zeros(3), "big": np.random.default_rng(0).normal(size=8_000_000)}, {"n": 2}, 0.0)
checkpointer.wait()
"""


def test_killed_in_mid_save(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    leftovers = [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
    assert leftovers, "the process was not killed in mid-save"
    like = {"x": jnp.zeros(3), "big": np.zeros(0)}
    with Checkpointer(tmp_path) as checkpointer:
        epoch, got, meta = checkpointer.restore(like)
        assert (epoch, meta, got["x"].tolist()) == (1, {"n": 1}, [1.0, 1.0, 1.0])
        checkpointer.save(2, {"x": jnp.full(3, 2.0), "big": np.zeros(5)}, {"n": 2}, 0.0)  # the same number again
        epoch, got, meta = checkpointer.restore(like)
        assert (epoch, meta, got["x"].tolist(), got["big"].shape) == (2, {"n": 2}, [2.0] * 3, (5,))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]


def test_another_configuration_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros((2, 3)), "old": jnp.zeros(1), "host": np.zeros((5, 2))}, {}, 0.0)
        like = {"x": jnp.zeros((2, 4)), "new": jnp.zeros(1), "host": np.zeros((0, 3))}
        with pytest.raises(ValueError) as error:
            checkpointer.restore(like)
    message = str(error.value)
    assert "\n" not in message
    for part in ("missing: new", "unexpected: old", "x: stored float32[2, 3], expected float32[2, 4]", "host: stored"):
        assert part in message


@pytest.mark.parametrize("damage", ["truncated", "meta gone", "foreign"])
def test_damaged_and_foreign_folders(tmp_path, damage):
    like = {"x": jnp.zeros(1000)}
    folder = tmp_path / "checkpoints" / "1"
    if damage == "foreign":
        folder.mkdir(parents=True)
        (folder / "model.bin").write_bytes(b"someone else's")
    else:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, {"x": jax.random.normal(jax.random.key(0), (1000,))}, {}, 0.0)
        victims = [path for path in folder.rglob("*") if path.is_file()]
        if damage == "truncated":
            for path in victims:
                if "/d/" in str(path):
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            for path in (folder / "meta").iterdir():
                path.unlink()
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="cannot be read") as error:
        checkpointer.restore(like)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(ValueError, match="cannot make the folder"):
        Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.keep: received 0"):
        Checkpointer(tmp_path, keep=0)
