"""What a run tells of itself while it runs: traces, times, and what it waits for when nothing moves."""

import re
import time
import types

import jax
import pytest
import tiny
import tiny_reward
from ml_collections import ConfigDict
from waiting import until

from ddpo_jax import sharding
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.training import watch
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics

REWARD = {"reward.name": "tiny_reward:reward"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of a run of four epochs of which the second and third are traced."""
    tiny_reward.reset()
    workdir = tmp_path_factory.mktemp("runs") / "traced"
    train(tiny.tiny_ready(folder, num_epochs=4, **{"log.profile": "1:3"}, **REWARD), workdir)
    return workdir


def test_a_trace_of_the_epochs_that_were_asked_for(run):
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    epochs = {
        dict(event.stats)["step_num"]
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "epoch"
    }
    assert epochs == {1, 2}


def test_updates_copy_nothing_to_the_host_but_their_metrics_in_one_go(run):
    """By the trace's own record of every copy; on a CPU JAX's transfer guard does not see them."""
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]

    def spans(pattern):
        return [(e.start_ns, e.start_ns + e.duration_ns) for e in events if re.search(pattern, e.name)]

    def inside(inner, outers):
        return any(outer[0] <= inner[0] and inner[1] <= outer[1] for outer in outers)

    optimise = spans(r"epoch\.py:\d+ optimise$")
    meant = [span for span in spans(r"\bdevice_get$") if inside(span, optimise)]
    copies = [span for span in spans(r"^np\.asarray\(jax\.Array\)$") if inside(span, optimise)]
    assert len(optimise) == 2 and len(meant) == 2 and copies  # two epochs were traced
    assert all(inside(copy, meant) for copy in copies)


def test_the_times_of_a_row_are_parts_of_its_epoch(run):
    rows = metrics.read_metrics(run)
    for row in rows:
        parts = sum(row[f"time/{part}_s"] for part in ("rollout", "reward", "update"))
        assert 0 < parts <= row["time/epoch_s"]
        images = row["reward_queries"] / (row["epoch"] + 1)
        assert row["time/images_per_s_host"] == pytest.approx(images / row["time/epoch_s"])  # one host
    assert rows[0]["time/save_s"] == 0 and rows[1]["time/save_s"] > 0  # of the checkpoint before
    assert "time/device_peak_gib" not in rows[0]  # a CPU does not tell


def test_the_peak_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, {"bytes_in_use": 9}, None]
    monkeypatch.setattr(
        jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    )
    assert watch.device_peak_bytes() == 7


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(watch.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def wait_for_lines(said, count):
    until(lambda: len(said) >= count, 20)
    time.sleep(0.1)  # none of them is said twice
    assert len(said) == count
    return said[-1]


def test_what_a_run_waits_for_is_said_once_for_each_stage(tmp_path, said):
    computing = ["reward 'mine', call 3 (8 images), for 7 s"]
    options = ConfigDict({"profile": "", "stall_s": 0.05})
    with watch.Watch(tmp_path, options, lambda: computing[0]) as ours, ours.epoch(4):
        ours.stage("sampling")
        line = wait_for_lines(said, 1)
        assert line.startswith("epoch 4: sampling since ") and line.endswith(f"it waits for {computing[0]}")
        computing[0] = ""
        ours.stage("sampling")  # progress
        assert "the devices, which draw images" in wait_for_lines(said, 2)
        ours.stage("saving")
        assert "the disk, which takes the checkpoint" in wait_for_lines(said, 3)
    time.sleep(0.2)
    assert len(said) == 3 and all("\n" not in line for line in said)


def test_progress_in_time_is_not_worth_a_line(tmp_path, said):
    with watch.Watch(tmp_path, ConfigDict({"profile": "", "stall_s": 5.0}), str) as ours, ours.epoch(0):
        for stage in ("sampling", "updating", "writing"):
            ours.stage(stage)
    assert said == []


@pytest.mark.parametrize(("text", "epochs"), [("", []), ("2:4", [2, 3]), ("0:1", [0])])
def test_epochs_of_a_trace(text, epochs):
    assert list(watch.traced_epochs(text)) == epochs


@pytest.mark.parametrize(
    ("key", "value"), [("log.profile", "4:2"), ("log.profile", "2"), ("log.profile", "a:b"), ("log.stall_s", "0")]
)
def test_wrong_values_are_one_line(key, value):
    config = default_config()
    override(config, [("model", "mini"), (key, value)])
    with pytest.raises(ValueError, match=f"{key}: received .*; it must be .*; use ") as raised:
        make_ready(config, "cpu", 1)
    assert "\n" not in str(raised.value)


def test_an_unwanted_copy_in_the_updates_ends_the_run(folder, tmp_path, monkeypatch):
    """A minibatch that is left on the host would be copied anew by every program that reads it."""
    tiny_reward.reset()
    monkeypatch.setattr(sharding, "put_batch", lambda batch, mesh: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(tiny.tiny_ready(folder, num_epochs=1, **REWARD), tmp_path)
