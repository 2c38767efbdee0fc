"""A run is the same on any devices: 1, 2, 4 and 8 of them, data x fsdp in every factorisation."""

import numpy as np
import pytest
import tiny

from ddpo_jax import sharding
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics
from ddpo_jax.workdir.checkpoint import Checkpointer

FAST = {(2, 4)}
MESHES = [(devices // fsdp, fsdp) for devices in (2, 4, 8) for fsdp in (1, 2, 4, 8) if fsdp <= devices]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


def run(folder, workdir, data, fsdp):
    """Rows without times, and the arrays of the last checkpoint, of two epochs with 8 replayed samples."""
    keys = {"mesh.data": data, "mesh.fsdp": fsdp, "replay.name": "hard", "replay.k": 8 // (data * fsdp)}
    keys |= {"sample.num_batches_per_epoch": 2, "reward.name": "tiny_reward:reward"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MIN_SHARDED_SIZE", 64)  # all parameters of the model are smaller than that
        train(tiny.tiny_ready(folder, **keys), workdir)
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics.read_metrics(workdir)]
    with Checkpointer(workdir, read_only=True) as saver:
        return rows, saver.read(2, "state/params"), saver.read(2, "replay")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("runs"), 1, 1)


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh in FAST else pytest.mark.slow) for mesh in MESHES], ids=str
)
def test_devices_change_nothing_but_rounding(folder, alone, tmp_path, mesh):
    rows, params, replay = run(folder, tmp_path, *mesh)
    for ours, theirs in zip(rows, alone[0], strict=True):
        rounding = "train/ratio_first_update_deviation"  # it is nothing else, so it has a bound and no value
        assert max(ours[rounding], theirs[rounding]) < 1e-5
        assert ours == pytest.approx(theirs | {rounding: ours[rounding]}, rel=2e-4, abs=2e-6)
    assert params.keys() == alone[1].keys() and replay.keys() == alone[2].keys()
    for name, value in alone[1].items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    for name, value in alone[2].items():
        np.testing.assert_allclose(replay[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
    noise, expected = (found["latents"].reshape(32, 4, 8, 8, 4)[:, 0] for found in (replay, alone[2]))
    np.testing.assert_array_equal(noise, expected)
