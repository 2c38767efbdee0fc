"""Weights & Biases: what is sent, to which run, and that nothing of it can end a run."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.training.loop import train
from ddpo_jax.workdir.metrics import Writer, read_metrics
from ddpo_jax.workdir.tracker import Tracker

CONFIG = ConfigDict({"seed": 3, "reward": {"name": "remote", "token": "secret"}, "train": {"lora_targets": ("a", "b")}})


class Run:
    """In place of a run there: remembers what it was told."""

    url = None

    def __init__(self, options):
        self.options, self.logged, self.steps, self.axes, self.finished = options, [], [], {}, 0

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, entry, step, commit):
        assert commit and step > max(self.steps, default=-1)  # else the package drops it
        self.logged.append(entry)
        self.steps.append(step)

    def finish(self):
        self.finished += 1


@pytest.fixture
def runs(monkeypatch):
    """The runs that were begun by a stand-in for the package."""
    begun = []

    def init(**options):
        begun.append(Run(options))
        return begun[-1]

    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.init, package.Settings, package.Image = init, dict, np.array
    monkeypatch.setitem(sys.modules, "wandb", package)
    return begun


def row(epoch):
    return {"epoch": epoch, "reward/mean": 0.5 * epoch, "reward_queries": 8 * (epoch + 1), "bad": float("nan")}


def test_it_gets_the_rows_and_pictures_of_the_folder(runs, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with Writer(tmp_path, tracker=Tracker(tmp_path, "mine", CONFIG)) as writer:
        writer.fixed(0, images, ["a", "b"])
        writer.write(row(2))
        path = writer.images(2, images, ["a", "b"], [0.1, 0.2])
    (run,) = runs
    before, numbers, samples = run.logged
    assert numbers == {"epoch": 2, "reward/mean": 1.0, "reward_queries": 24}  # null is no number
    assert (before["epoch"], samples["epoch"]) == (0, 2)
    np.testing.assert_array_equal(samples["samples"], np.asarray(Image.open(path)))
    shown = np.asarray(Image.open(tmp_path / "samples" / "before.png"))
    np.testing.assert_array_equal(before["fixed_prompts"], shown)
    assert run.axes == {"*": "epoch"} and run.finished == 1
    assert (run.options["project"], run.options["name"], run.options["dir"]) == ("mine", tmp_path.name, str(tmp_path))
    sent = run.options["config"]
    assert sent["seed"] == 3 and sent["reward.name"] == "remote" and "secret" not in str(run.options)


def test_a_resumed_run_goes_on_in_the_same_one(runs, tmp_path):
    for project in ("mine", "mine", "other", "mine"):
        Tracker(tmp_path, project, CONFIG).close()
    first, again, other, last = (run.options["id"] for run in runs)
    assert first == again == last != other
    assert all(run.options["resume"] == "allow" for run in runs)
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"mine": first, "other": other}
    Tracker(tmp_path / "elsewhere", "mine", CONFIG)
    assert runs[-1].options["id"] != first


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"mine": 3}', '{"mine": "a b"}', '{"mine": ""}'])
def test_a_damaged_file_of_ids_is_one_line(runs, tmp_path, content):
    (tmp_path / "wandb.json").write_text(content)
    with pytest.raises(InputError, match="wandb.json") as caught:
        Tracker(tmp_path, "mine", CONFIG)
    assert "\n" not in str(caught.value) and runs == []


def test_a_package_that_does_not_start_is_one_line(runs, tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(
        InputError, match="log.wandb: received 'mine'; .*api_key not configured.*; run wandb login"
    ) as e:
        Tracker(tmp_path, "mine", CONFIG)
    assert "\n" not in str(e.value)


def test_a_fault_in_mid_run_is_told_once_and_the_run_goes_on(runs, tmp_path, caplog):
    tracker = Tracker(tmp_path, "mine", CONFIG)

    def broken(entry, step, commit):
        raise OSError("no space left")

    runs[0].log = broken
    with caplog.at_level("WARNING"), Writer(tmp_path, tracker=tracker) as writer:
        for epoch in range(3):
            writer.write(row(epoch))
    assert len(read_metrics(tmp_path)) == 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["Weights & Biases: OSError: no space left; the run goes on without it"]


def ready(*pairs):
    config = default_config()
    override(config, [("model", "mini"), *pairs])
    return make_ready(config, "cpu", 1)


def test_a_missing_package_is_refused_before_anything_is_loaded(runs, monkeypatch):
    assert ready(("log.wandb", "mine")).config.log.wandb == "mine"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"log.wandb: received 'mine'; .*pip install 'ddpo_jax\[wandb\]'") as caught:
        ready(("log.wandb", "mine"))
    assert "\n" not in str(caught.value)
    ready()  # nothing of it is needed by default


def test_a_training_run_is_tracked_and_resumed(runs, tmp_path):
    with tiny.quick_compilation():
        folder = tiny.tiny_pipeline_folder(tmp_path / "tiny", unet=tiny.SMALLEST_UNET)
        for epochs in (1, 2):
            train(tiny.tiny_ready(folder, **{"num_epochs": epochs, "log.wandb": "mine"}), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    sent = [entry for run in runs for entry in run.logged if "reward/mean" in entry]
    assert sent == [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert len({run.options["id"] for run in runs}) == 1 and [run.finished for run in runs] == [1, 1]
    assert sum("samples" in entry for run in runs for entry in run.logged) == 2
    steps = [step for run in runs for step in run.steps]
    assert steps == sorted({*steps}), "the second process must go on counting where the first one was"


def test_offline_with_the_package_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for epoch in range(2):
        with Writer(tmp_path, epoch, Tracker(tmp_path, "mine", CONFIG)) as writer:
            writer.write(row(epoch))
            writer.images(epoch, images, ["a"], [0.5])
    number = json.loads((tmp_path / "wandb.json").read_text())["mine"]
    kept = sorted(tmp_path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert len(kept) == 2 and all(b"reward/mean" in path.read_bytes() for path in kept)
    assert len([*tmp_path.glob("wandb/offline-run-*/files/media/images/samples*.png")]) == 2
