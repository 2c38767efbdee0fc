"""The command line: exit codes, one clear line for each fault, no traceback of ours."""

import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from ddpo_jax import errors, find, main
from ddpo_jax.config.file import load_file
from ddpo_jax.config.keys import from_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--config=configs/compressibility.py", "--config.sample.num_steps=2"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def train(monkeypatch):
    """Stands in for ``training.loop``: records its arguments, and does what ``act`` says."""
    calls = []
    module = types.ModuleType("ddpo_jax.training.loop")
    module.act = lambda: None

    def stand_in(ready, workdir):
        calls.append((ready.config, workdir))
        module.act()

    module.train, module.calls = stand_in, calls
    monkeypatch.setitem(sys.modules, "ddpo_jax.training.loop", module)
    monkeypatch.setattr("ddpo_jax.training.loop", module, raising=False)
    return module


def run(capsys, *argv) -> tuple[int, list[str]]:
    code = main.main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


# ---- what is passed on ----


def test_a_good_command_trains_the_resolved_config(capsys, train, tmp_path):
    argv = [*SMALL, f"--workdir={tmp_path / 'a' / 'b'}", "--config.seed", "7", "--config.mesh.data", "-1"]
    assert run(capsys, *argv) == (0, [])
    ((config, workdir),) = train.calls
    assert workdir == tmp_path / "a" / "b" and workdir.is_dir() and not list(workdir.iterdir())
    assert (config.seed, config.model, config.reward.name) == (7, "mini", "jpeg_compressibility")
    assert config.train.batch_size == 64


def test_choices_come_before_overrides_and_workdir_has_a_default(capsys, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs/compressibility.py"
    run(capsys, f"--config={file}:reward=jpeg_incompressibility,seed=3,num_epochs=5", "--config.seed=4")
    ((config, workdir),) = train.calls
    assert workdir == pathlib.Path("runs/compressibility")
    assert (config.reward.name, config.seed, config.num_epochs) == ("jpeg_incompressibility", 4, 5)


@pytest.mark.parametrize(
    "name, reward",
    [
        ("aesthetic", "aesthetic"),
        ("alignment", "mini_verifier"),
        ("compressibility", "jpeg_compressibility"),
        ("incompressibility", "jpeg_incompressibility"),
    ],
)
def test_shipped_configs(name, reward):
    config = load_file(pathlib.Path(f"configs/{name}.py"), "seed=5")
    assert (config.reward.name, config.seed) == (reward, 5)
    assert f"--config=configs/{name}.py" in (ROOT / f"configs/{name}.py").read_text()


def test_help_names_every_key_and_member(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("train.learning_rate=", "prompts.samples_per_prompt=4", "algorithm.name=ddpo", "--workdir"):
        assert key in text
    for name in find.available("rewards"):
        assert name in text


# ---- wrong input: exit 2 ----


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], ["--config: received nothing"]),
        (["--config"], ["--config: received no value"]),
        (["--config="], ["--config: received an empty value"]),
        (["--confg=configs/aesthetic.py"], ["unknown flag '--confg': nearest is '--config'"]),
        (
            ["--config=configs/aesthetik.py"],
            ["--config: received 'configs/aesthetik.py'; there is no such file; did you mean"],
        ),
        (["--config=/nowhere/x.py"], ["--config: received '/nowhere/x.py'; there is no such file; give a Python file"]),
        (["--config=configs"], ["--config: received 'configs'; it is a folder"]),
        ([*SMALL, "train"], ["'train': not a flag"]),
        ([*SMALL, "--learning_rate=1"], ["unknown flag '--learning_rate': nearest is '--config.train.learning_rate'"]),
        ([*SMALL, "--config.seed"], ["--config.seed: received no value"]),
        ([*SMALL, "--config.seed", "--config.num_epochs=1"], ["--config.seed: received no value"]),
        ([*SMALL, "--config.train.lr=1"], ["unknown key 'train.lr'"]),
        ([*SMALL, "--config.train.batch_size=1.5"], ["train.batch_size: received '1.5'; it must be a whole number"]),
        ([*SMALL, "--config.train.batch_size=24"], ["train.batch_size: received 24; it must divide"]),
        ([*SMALL, "--config.model=/nowhere"], ["model: received '/nowhere'; no such folder"]),
        ([*SMALL, "--config.algorithm.name=none.such"], ["algorithm.name: received 'none.such'; "]),
        (["--config=configs/compressibility.py:algorithm"], ["config argument: received 'algorithm'"]),
        (
            [
                *SMALL,
                "--config.seed=-1",
                "--config.sample.eta=0",
                "--config.sample.batch_size=12",
                "--config.mesh.data=8",
            ],
            ["seed: received -1", "sample.eta: received 0.0", "sample.batch_size: received 12"],
        ),
    ],
)
def test_wrong_input(capsys, train, argv, expected):
    code, found = run(capsys, *argv)
    assert code == 2 and not train.calls
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "text, choices, why",
    [
        ("def get_config(:\n", "", "line 1 is not Python"),
        ("x = 1\n", "", "it defines no function get_config"),
        ("get_config = 3\n", "", "it defines no function get_config"),
        ("def get_config(): return {}\n", "", "get_config returned a dict"),
        ("def get_config(): return 1\n", ":seed=1", "its get_config() takes none"),
        ("import no_such_module\n", "", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    x = {}\n    return x['a']\n", "", "line 3: KeyError: 'a'"),
        ("def get_config():\n    raise ValueError('mine')\n", "", "line 2: ValueError: mine"),
        ("raise SystemExit(0)\n", "", "line 1: SystemExit"),
        ("def get_config():\n    raise GeneratorExit\n", "", "line 2: GeneratorExit"),
        ("", "", "it defines no function get_config"),
        (
            "class Odd(Exception):\n    def __str__(self): raise KeyError\n\ndef get_config(): raise Odd\n",
            "",
            "line 4: Odd: (its message cannot be shown)",
        ),
        (
            "from ddpo_jax.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.train.learnin_rate = 1.0\n    return c\n",
            "",
            "line 4: AttributeError",
        ),
    ],
)
def test_wrong_config_files(capsys, train, tmp_path, text, choices, why):
    file = tmp_path / "mine.py"
    file.write_text(text)
    code, found = run(capsys, f"--config={file}{choices}")
    assert code == 2 and len(found) == 1 and not train.calls
    assert found[0].startswith(f"--config: received '{file}'") and why in found[0]


@pytest.mark.parametrize(
    "change, line",
    [
        ("    with c.unlocked(): del c.reward", "reward.name: received nothing"),
        ("    with c.unlocked(): del c.weighting.name", "weighting.name: received nothing"),
        ("    with c.unlocked(), c.ignore_type(): c.replay = 3", "replay.name: received nothing"),
        ("    with c.unlocked(): del c.train.batch_size", "train.batch_size: received nothing"),
        ("    c = type(c)()", "algorithm.name: received nothing"),
    ],
)
def test_a_config_that_lacks_something(capsys, train, tmp_path, change, line):
    start = "from ddpo_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    text = f"{start}{change}\n    return c\n"
    (tmp_path / "mine.py").write_text(text)
    code, found = run(capsys, f"--config={tmp_path / 'mine.py'}")
    assert code == 2 and found[0].startswith(line) and not train.calls


def test_a_config_file_that_is_not_text(capsys, train, tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\x00\xff\xfe")
    code, found = run(capsys, f"--config={tmp_path / 'mine.py'}")
    assert code == 2 and len(found) == 1


def test_our_own_lines_pass_through_a_config_file(capsys, train, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ddpo_jax.config import choose, default_config\n"
        "def get_config():\n    c = default_config()\n    choose(c, 'algorithm', 'loup')\n    return c\n"
    )
    code, (line,) = run(capsys, f"--config={tmp_path / 'mine.py'}")
    assert code == 2 and line.startswith("algorithm.name: received 'loup'")


@pytest.mark.parametrize("where", ["file", "below a file", "no permission"])
def test_workdir_that_cannot_be_written(capsys, train, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    workdir = {"file": tmp_path / "file", "below a file": tmp_path / "file/run", "no permission": "/proc/run"}[where]
    code, (line,) = run(capsys, *SMALL, f"--workdir={workdir}")
    assert code == 2 and line.startswith(f"--workdir: received '{workdir}'; cannot write there: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("workdir", ["w" * 300, "~nouser/run", "a\0b"])
def test_workdir_with_an_impossible_name(capsys, train, workdir):
    code, (line,) = run(capsys, *SMALL, f"--workdir={workdir}")
    assert code == 2 and line.startswith(f"--workdir: received '{workdir}'; cannot write there: ")


# ---- how a run ends ----


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    "error, code, line",
    [
        (errors.RunFailure("epoch 3: the reward raised KeyError"), 1, "error: epoch 3: the reward raised KeyError"),
        (errors.Interrupted(15), 143, "stopped by SIGTERM"),
        (errors.Interrupted(2, "stopped after epoch 4"), 130, "stopped after epoch 4"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_codes(capsys, train, tmp_path, error, code, line):
    train.act = raising(error)
    assert main.main([*SMALL, f"--workdir={tmp_path}"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_value_errors_of_ours_are_lines_and_those_of_others_keep_their_traceback(capsys, train, tmp_path):
    argv = [*SMALL, f"--workdir={tmp_path}"]
    train.act = lambda: find.find("rewards", "none_such")
    assert run(capsys, *argv)[0] == 2

    def ours_with_a_cause():
        from_json("{")

    train.act = ours_with_a_cause
    code, (line,) = run(capsys, *argv)
    assert code == 2 and line.startswith("config.json: line 1")

    def in_jax():
        import jax.numpy as jnp

        jnp.concatenate([])

    for act in (in_jax, lambda: np.zeros(3).reshape(2), lambda: int("x"), raising(ValueError("not ours"))):
        train.act = act
        with pytest.raises(ValueError):
            main.main(argv)
    train.act = raising(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main.main(argv)


# ---- as a process ----


def process(*argv, **variables):
    return subprocess.run(
        [sys.executable, "-m", "ddpo_jax.main", *argv],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_process_reports_all_faults_without_a_traceback(tmp_path):
    done = process(*SMALL, "--config.seed=-1", "--config.num_epochs=0", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_process_on_a_platform_that_is_not_there():
    done = process(*SMALL, JAX_PLATFORMS="nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS: received 'nonsense'; JAX finds no device")


def test_process_answers_without_importing_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')\n")
    broken = {"PYTHONPATH": str(tmp_path)}
    assert process("--help", **broken).returncode == 0
    done = process("--config=configs/aesthetics.py", **broken)
    assert done.returncode == 2 and done.stderr == (
        "error: --config: received 'configs/aesthetics.py'; there is no such file; did you mean configs/aesthetic.py\n"
    )


def test_the_installed_command_leaves_as_the_module_does(monkeypatch):
    """Through ``leave``, which ends a reward that hangs and says good-bye to other processes."""
    import ddpo_jax.__main__ as command
    from ddpo_jax.commands import _cli

    text = (ROOT / "setup.py").read_text()
    assert '"ddpo_jax = ddpo_jax.__main__:console"' in text
    left = []
    monkeypatch.setattr(sys, "argv", ["ddpo_jax", "nothing"])
    monkeypatch.setattr(_cli, "leave", left.append)
    command.console()
    assert left == [2]
