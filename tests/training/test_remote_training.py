"""Whole runs whose rewards come from elsewhere: a server that is killed and comes back, a person who goes away."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import tiny
import tiny_reward
from http_tools import rated, stars
from waiting import until

from ddpo_jax.errors import InputError, Interrupted, RunFailure
from ddpo_jax.rewards._shared import http as _http
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics

HELPERS = pathlib.Path(__file__).resolve().parents[1] / "helpers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


def values(workdir):
    """The rows of a run without its times."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in metrics.read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The rows of a run whose reward is computed in its own process."""
    tiny_reward.reset()
    workdir = tmp_path_factory.mktemp("runs") / "local"
    train(tiny.tiny_ready(folder, num_epochs=3, **{"reward.name": "tiny_reward:reward"}), workdir)
    return values(workdir)


@pytest.fixture
def log(monkeypatch):
    lines = []

    def note(text, *args):
        lines.append(text % args)

    monkeypatch.setattr(_http, "logging", types.SimpleNamespace(info=note, warning=note))
    return lines


class Serving:
    """``ddpo_jax serve`` of the tiny reward in a process of its own."""

    def __init__(self, port=0, **environment):
        path = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ddpo_jax", "serve", "--reward=tiny_reward:reward", f"--port={port}"],
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else self.process.stderr.read()
        self.port = int(self.url.rpartition(":")[2])

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def remote_config(folder, url, **overrides):
    # Two requests an epoch.
    chosen = {"reward.name": "remote", "reward.url": url, "reward.batch_size": 4, "reward.timeout_s": 60.0}
    return tiny.tiny_ready(folder, num_epochs=3, **chosen | overrides)


def test_a_run_waits_for_a_server_that_is_killed_and_ends_with_the_same_numbers(folder, undisturbed, tmp_path, log):
    """kill -9 while the fourth of six requests is computed, in the second epoch."""
    first, started = Serving(TINY_KILL_AT="3"), []

    def bring_back():
        assert first.process.wait(timeout=300) == -signal.SIGKILL
        time.sleep(1)
        started.append(Serving(first.port))

    helper = threading.Thread(target=bring_back)
    helper.start()
    train(remote_config(folder, first.url), tmp_path / "run")
    helper.join()
    assert values(tmp_path / "run") == undisturbed
    waited = [line for line in log if line.startswith(f"waiting for {first.url}, which cannot be reached: ")]
    assert waited and "giving up in " in waited[0] and any("answers again" in line for line in log)
    code, output, errors = started[0].end()
    assert (code, output) == (143, "") and "stopped by SIGTERM" in errors and "Traceback" not in errors


def test_when_patience_ends_the_run_is_saved_and_goes_on_with_another_server(folder, undisturbed, tmp_path):
    first = Serving(TINY_KILL_AT="2")
    with pytest.raises(
        RunFailure, match=r"epoch 1: reward 'remote': .* cannot be reached: .*tried \d+ times"
    ) as caught:
        train(remote_config(folder, first.url, **{"reward.patience_s": 0.7}), tmp_path / "run")
    assert "\n" not in str(caught.value) and values(tmp_path / "run") == undisturbed[:1]
    with pytest.raises(InputError, match="reward.url: .*start a server there"):
        train(remote_config(folder, first.url), tmp_path / "run")
    second = Serving()
    train(remote_config(folder, second.url), tmp_path / "run")
    assert values(tmp_path / "run") == undisturbed
    second.end()


def human_config(folder, workdir, **overrides):
    chosen = {"reward.name": "human", "reward.folder": str(workdir / "answers"), "reward.port": 0}
    return tiny.tiny_ready(folder, **chosen | overrides)


@pytest.fixture
def page(monkeypatch):
    """Addresses of the pages that runs open, in order."""
    from ddpo_jax.feedback import app

    found, serve = [], app.serve

    def noted(*args, **options):
        server = serve(*args, **options)
        found.append(server.url)
        return server

    monkeypatch.setattr(app, "serve", noted)
    return found


def await_page(page, count):
    until(lambda: len(page) >= count, 300)
    return page[count - 1]


@pytest.mark.parametrize("mode", ["score", "pairs"])
def test_a_run_that_is_stopped_in_a_half_rated_batch_goes_on_where_the_person_was(folder, tmp_path, page, mode):
    """By two signals, after all answers of the first epoch and some of the second. A run that nobody disturbs asks as
    many questions and has the same numbers."""

    def value(task, images):
        if mode == "score":
            return stars(task, images)
        return task["images"][int(images[0].mean() < images[1].mean())]

    def undisturbed():
        with rated(await_page(page, 1), value, count=2) as people:
            done.wait(300)
            asked.append(sum(person.given for person in people))

    done, asked = threading.Event(), []
    helper = threading.Thread(target=undisturbed)
    helper.start()
    train(human_config(folder, tmp_path / "whole", **{"reward.mode": mode}), tmp_path / "whole")
    done.set()
    helper.join()
    expected = values(tmp_path / "whole")
    assert len(expected) == 2 and expected[0]["reward/std"] > 0
    each = asked[0] // 2

    def goes_away():
        with rated(await_page(page, 2), value, limit=each + 2) as people:
            person = people[0]
            while person.given < each + 2:
                time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    helper = threading.Thread(target=goes_away)
    helper.start()
    with pytest.raises(Interrupted):
        train(human_config(folder, tmp_path / "run", **{"reward.mode": mode}), tmp_path / "run")
    helper.join()
    done.clear()
    answers = tmp_path / "run" / "answers" / "answers.jsonl"
    before = len(answers.read_text().splitlines())
    assert before == each + 2 < 2 * each and values(tmp_path / "run") == expected[:1]

    def comes_back():
        with rated(await_page(page, 3), value):
            done.wait(300)

    helper = threading.Thread(target=comes_back)
    helper.start()
    train(human_config(folder, tmp_path / "run", **{"reward.mode": mode}), tmp_path / "run")
    done.set()
    helper.join()
    assert values(tmp_path / "run") == expected
    assert len(answers.read_text().splitlines()) == 2 * each  # nothing was asked twice
