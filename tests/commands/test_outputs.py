"""Where results go and what is read for them: whatever is wrong is one line before any work is done."""

import json
import os

import pytest

from ddpo_jax import main
from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import compare, export, measure, pretrain, sample, sweep
from ddpo_jax.config import default_config
from ddpo_jax.config.keys import to_json
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.errors import RunFailure
from ddpo_jax.workdir import files

SWEEP = 'def runs():\n    return [{"name": "a", "config": "one.py"}]\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a run, a sweep, a config file, a file and a folder."""
    monkeypatch.chdir(tmp_path)
    config = default_config()
    override(config, [("model", "mini")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(resolve(config, "cpu")[0]))
    row = {"epoch": 0, "reward_queries": 8, "reward/mean": 0.5}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "one.py").write_text("from ddpo_jax.config import default_config as get_config\n")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def line(capsys, command, *argv):
    """The one line of a command that is refused."""
    assert cli.run(command, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


FOLDERS = {
    "a file": "file",
    "below a file": "file/deeper",
    "read-only": "/proc/mine",
    "too long": "n" * 300,
    "no such user": "~nobody-of-that-name/x",
    "a null": "a\0b",
}
COMMANDS = {
    "compare": (compare.main, ["run", "--out=OUT"]),
    "export": (export.main, ["--workdir=run", "--out=OUT"]),
    "sweep": (sweep.main, ["sweep.py", "--out=OUT"]),
    "measure": (measure.main, ["--config=one.py", "--out=OUT"]),
    "pretrain": (pretrain.main, ["--workdir=OUT"]),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", COMMANDS)
def test_folders_that_cannot_be_written(here, capsys, name, kind):
    command, argv = COMMANDS[name]
    said = line(capsys, command, *(word.replace("OUT", FOLDERS[kind]) for word in argv))
    flag = "--workdir" if name == "pretrain" else "--out"
    assert said.startswith(f"error: {flag}: received '{FOLDERS[kind]}'; cannot write there: "), said
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_address_does_not_become_a_folder(here, capsys, name):
    command, argv = COMMANDS[name]
    said = line(capsys, command, *(word.replace("OUT", "gs://bucket/x") for word in argv))
    assert "received 'gs://bucket/x'; it is an address" in said
    assert not list(here.glob("gs*"))


@pytest.mark.parametrize("out", ["folder.png", "file/x.png", "/proc/x.png", "n" * 300 + ".png", "~nobody-of-it/x.png"])
def test_files_that_cannot_be_written(here, capsys, out):
    said = line(capsys, sample.main, "--model=mini", "--prompt=a", f"--out={out}")
    assert said.startswith(f"error: --out: received '{out}'; "), said
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [sample.main, export.main, compare.main])
def test_an_argument_that_is_no_text(here, capsys, command):
    prompt = os.fsdecode(b"--prompt=caf\xe9")
    said = line(capsys, command, "--model=mini", prompt, "--out=x.png")
    assert "received the argument '--prompt=caf\\udce9', which is not UTF-8 text" in said


def test_an_argument_of_the_training_that_is_no_text(here, capsys):
    assert main.main(["--config=one.py", os.fsdecode(b"--workdir=\xff")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_that_are_damaged_are_a_line_each(here, capsys):
    for name, config, metrics in (
        ("a", "[]", "{}\n"),
        ("b", "{", ""),
        ("c", (here / "run" / "config.json").read_text(), "null\n"),
        ("d", (here / "run" / "config.json").read_text(), ""),
    ):
        (here / name).mkdir()
        (here / name / "config.json").write_text(config)
        (here / name / "metrics.jsonl").write_text(metrics)
    assert cli.run(compare.main, ["run", "a", "b", "c", "d", "nowhere", "--out=out"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    for text, part in zip(
        said,
        ["a/config.json", "b/config.json", "c/metrics.jsonl, line 1", "'d'; it has no metrics", "'nowhere'; it has no"],
        strict=True,
    ):
        assert text.startswith("error: ") and part in text


@pytest.mark.parametrize("text", ["", "[]", "\xff", "[" * 50_000, '{"seed": 1}'])
@pytest.mark.parametrize("command", [export.main, sample.main])
def test_a_run_with_a_damaged_config_is_one_line(here, capsys, command, text):
    (here / "run" / "config.json").write_bytes(text.encode("latin-1"))
    said = line(capsys, command, "--workdir=run", "--out=x.png", *(["--prompt=a"] if command is sample.main else []))
    assert "run/config.json" in said


# ---- files ----


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(RunFailure, match="cannot write .*a.json: No space left on device; mend that"):
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"] and json.loads(path.read_text()) == {"a": 1}


def test_what_does_not_fit_is_written_as_far_as_it_goes(tmp_path, monkeypatch):
    """A system that takes three bytes at a time gets all of them."""
    path = tmp_path / "a"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    files.append(file, b"0123456789")
    os.close(file)
    assert path.read_bytes() == b"0123456789"
