"""The sweep runner, with a stand-in for the training process: order, skipping, failures, signals, comparison."""

import json
import os
import pathlib
import shlex
import signal
import stat
import sys
import threading
import time

import pytest

from ddpo_jax import errors
from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import sweep as command
from ddpo_jax.config import default_config
from ddpo_jax.config.keys import to_json
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.studies import sweep
from ddpo_jax.workdir import metrics

FILE = '''"""Claim: a."""
BASELINE = "ddpo"
def runs():
    return [
        {"panel": "p", "name": "ddpo", "config": "one.py:model=mini", "num_epochs": 2},
        {"panel": "p", "name": "loop", "config": "one.py:model=mini,algorithm=loop", "num_epochs": 2},
        {"panel": "q", "name": "bad", "config": "sub/two.py"},
    ]
'''
# In place of python: notes its arguments, and trains by copying; "bad" fails, "slow" waits for a signal.
STANDIN = """#!/usr/bin/env bash
echo "$@" >> "{calls}"
for word in "$@"; do case $word in --workdir=*) dir=${{word#--workdir=}};; --out=*) out=${{word#--out=}};; esac; done
case "$*" in
  *" evaluate "*) mkdir -p "$out"
    echo '{{"rewards": {{"r": {{"base": {{"mean": 1.0}}, "trained": {{"mean": 3.0}}}}}}}}' > "$out/evaluation.json"
    exit 0;;
  *two.py*) echo "error: no such reward" >&2; exit 2;;
  *cores.py*) sleep 0.5; grep Cpus_allowed_list /proc/self/status >> "{folder}/cores.txt";;
  *slow.py*) trap 'exit 143' TERM; for i in $(seq 200); do sleep 0.05; done; exit 0;;
esac
name=ddpo; case "$*" in *algorithm=loop*) name=loop;; esac
cp "{folder}/$name.json" "$dir/config.json"
cp "{folder}/$name.jsonl" "$dir/metrics.jsonl"
"""


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Puts the stand-in in place of Python; the file to which it writes its arguments, and a sweep file."""
    folder = tmp_path / "standin"
    folder.mkdir()
    for name, rewards in (("ddpo", [0.0, 1.0]), ("loop", [1.0, 2.0])):
        config = default_config()
        override(config, [("model", "mini"), ("algorithm.name", name)])
        (folder / f"{name}.json").write_text(to_json(resolve(config, "cpu")[0]))
        rows = [{"epoch": i, "reward_queries": 8 * i + 8, "reward/mean": r} for i, r in enumerate(rewards)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = folder / "calls.txt"
    script = folder / "python"
    script.write_text(STANDIN.format(calls=calls, folder=folder))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    file = tmp_path / "sweeps" / "mine.py"
    file.parent.mkdir()
    file.write_text(FILE)
    return calls, file


def run(*argv):
    return cli.run(command.main, [str(word) for word in argv])


def test_a_sweep_runs_all_compares_and_reports_a_failure(standin, tmp_path, capsys):
    calls, file = standin
    out = tmp_path / "out"
    assert run(file, f"--out={out}", "--seeds=0,3", "--config.log.images_every=0") == 1
    lines = calls.read_text().splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        f"-m ddpo_jax.main --config={file.parent}/one.py:model=mini --workdir={out}/p/ddpo/seed0 "
        "--config.seed=0 --config.num_epochs=2 --config.log.images_every=0"
    )
    assert [line.split("--config.seed=")[1][0] for line in lines] == list("000333")  # seed by seed
    told = capsys.readouterr()
    assert "[1/6] p/ddpo seed 0: reward 0 -> 1, 16 queries in 0:0" in told.err and "ETA" in told.err
    assert "q/bad seed 0: FAILED (train, exit code 2): error: no such reward (see" in told.err
    assert "2 of 6 runs failed: q/bad seed 0, q/bad seed 3" in told.err
    assert "algorithm=ddpo (baseline)" in told.out and "algorithm=loop" in told.out
    result = json.loads((out / "p" / "compare.json").read_text())
    assert [len(group["runs"]) for group in result["groups"]] == [2, 2] and result["baseline"] == "algorithm=ddpo"
    assert "all panels" in told.out and (out / "overview.png").exists()
    over = json.loads((out / "overview.json").read_text())
    assert over["baseline"] == {"p": "ddpo"} and over["methods"]["loop"]["normalised_gain"]["value"] == 1.0


def test_finished_runs_are_skipped_and_others_tried_again(standin, tmp_path, capsys):
    calls, file = standin
    command = (file, f"--out={tmp_path / 'out'}", "--seeds=0")
    assert run(*command) == 1
    before = len(calls.read_text().splitlines())
    assert run(*command) == 1
    assert len(calls.read_text().splitlines()) == before + 1  # only the one that failed
    assert "p/ddpo seed 0: reward 0 -> 1, 16 queries, done before" in capsys.readouterr().err
    assert run(*command, "--config.num_epochs=3", "--only=p/*") == 0  # another command is another run: main decides
    assert len(calls.read_text().splitlines()) == before + 3


@pytest.mark.skipif(not sweep.core_sets(2), reason="one core, or a system that cannot pin processes to cores")
def test_runs_in_parallel_have_cores_of_their_own(standin, tmp_path):
    calls, file = standin
    runs = [{"panel": "p", "name": name, "config": "cores.py"} for name in "abc"]
    file.write_text(f'"""Claim: a."""\ndef runs():\n    return {runs}\n')
    before = os.sched_getaffinity(0)
    assert run(file, f"--out={tmp_path / 'out'}", "--seeds=0", "--parallel=2") == 0
    seen = (calls.parent / "cores.txt").read_text().splitlines()
    assert len(seen) == 3 and len(set(seen)) == 2  # the third takes those of one that has ended
    assert os.sched_getaffinity(0) == before
    first, second = sweep.core_sets(2)
    assert first and second and not first & second and first | second == before
    assert sweep.core_sets(1) == [] and sweep.core_sets(10**6) == []


def test_only_picks_and_says_when_the_baseline_is_missing(standin, tmp_path, capsys):
    calls, file = standin
    assert run(file, f"--out={tmp_path / 'out'}", "--seeds=1", "--only=p/loop", "--parallel=2") == 0
    assert len(calls.read_text().splitlines()) == 1
    assert "no run ddpo among these" in capsys.readouterr().out
    assert run(file, "--only=p/grpo") == 2
    assert "it picks none of p/ddpo, p/loop, q/bad" in capsys.readouterr().err


def test_a_run_is_followed_by_its_evaluation(standin, tmp_path, capsys):
    calls, file = standin
    flags = {"prompts": "novel", "rewards": "{reward},clip_score"}
    file.write_text(FILE.replace("BASELINE", f"EVALUATE = {flags!r}\nBASELINE"))
    out = tmp_path / "out"
    assert run(file, f"--out={out}", "--seeds=0,1", "--only=p/ddpo") == 0
    second = calls.read_text().splitlines()[1]
    assert second == (
        f"-m ddpo_jax evaluate --workdir={out}/p/ddpo/seed0 --prompts=novel --rewards=jpeg_compressibility,clip_score "
        f"--out={out}/p/ddpo/seed0/evaluation"
    )
    assert json.loads((out / "p" / "evaluations.json").read_text()) == {
        "ddpo": {"r": {"base": 1.0, "trained": 3.0, "seeds": 2}}
    }
    assert "ddpo  r: 1 -> 3 (2 seeds)" in capsys.readouterr().out
    stale = out / "p" / "ddpo" / "seed0" / "evaluation" / "settings.json"
    stale.write_text("{}")
    assert run(file, f"--out={out}", "--seeds=0", "--only=p/ddpo", "--config.num_epochs=9") == 0
    assert not stale.exists() and len(calls.read_text().splitlines()) == 6  # trained on, so evaluated anew


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_runs_and_starts_no_other(standin, tmp_path, number):
    calls, file = standin
    text = '"""A."""\ndef runs():\n    return [{"name": n, "config": "slow.py"} for n in ("a", "b", "c")]\n'
    file.write_text(text)
    plan = sweep.load(file)
    todo = sweep.jobs(plan, file, tmp_path / "out", [0], "", [])

    def stop():
        while not calls.exists():
            time.sleep(0.02)
        time.sleep(0.2)  # the stand-in has set its trap
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    with pytest.raises(errors.Interrupted) as stopped:
        sweep.Runner(lambda line: None).run(todo, 1)
    assert stopped.value.exit_code == 128 + number
    assert len(calls.read_text().splitlines()) == 1
    assert metrics.read_metrics(todo[0].workdir) == []


@pytest.mark.parametrize(
    "text, fault",
    [
        ("runs = 3\n", "it defines no function runs() that returns a list of dicts"),
        ("def runs():\n    return [{'name': 'a'}]\n", "each must be a dict with 'name' and 'config'"),
        ("def runs():\n    return [{'name': 'a', 'config': 'c.py'}] * 2\n", "two runs are named all/a"),
        ("def runs():\n    return {}['x']\n", "KeyError: 'x'"),
        ("def runs(:\n", "SyntaxError"),
        (
            "def runs():\n    return [{'name': 'a/b', 'config': 'c.py'}]\n",
            "'name': 'a/b'; it must be the name of a folder",
        ),
        ("def runs():\n    return [{'name': 'a', 'config': 3}]\n", "'config': 3; it must be text"),
        ("SEEDS = [0, 1]\ndef runs():\n    return []\n", "SEEDS is [0, 1]; it must be how many"),
        ("DIFFERENCE = 0\ndef runs():\n    return []\n", "DIFFERENCE is 0; it must be a number above 0"),
        ("EVALUATE = ['x']\ndef runs():\n    return []\n", "EVALUATE is ['x']; it must be a dict of flags"),
    ],
)
def test_a_faulty_sweep_file_is_one_line(tmp_path, capsys, text, fault):
    file = tmp_path / "s.py"
    file.write_text(text)
    assert run(file) == 2
    assert fault in capsys.readouterr().err


def test_wrong_flags_are_one_line(standin, capsys):
    _, file = standin
    for flags, fault in (
        ("--seeds=0,0", "--seeds: received '0,0'"),
        ("--config.seed", "--config.seed: received no value"),
    ):
        assert run(file, flags) == 2
        assert fault in capsys.readouterr().err
    assert run(file, "--dry-run", "--seeds=5", "--out=a folder") == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 3 and all(words[4].startswith("--workdir=a folder/") for words in printed)
    assert not pathlib.Path("a folder").exists()
