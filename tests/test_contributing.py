"""CONTRIBUTING.md taken at its word: its files are written where it says, its commands run, and a run uses them all.

The package is copied first: a new member must need no edit of any other file.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
from PIL import Image

from ddpo_jax import find
from ddpo_jax.workdir import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = re.compile(
    r"^### [^\n]*: `(?P<path>[\w/.]+)`\n```python\n(?P<file>.*?)```\n```\n(?P<command>.*?)\n```", re.M | re.S
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """``(folder, recipes)``: a copy of the repository with every file of CONTRIBUTING.md in its place."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("ddpo_jax", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("assets", "results", "__pycache__"))
    (folder / "ddpo_jax/mini/assets").symlink_to(ROOT / "ddpo_jax/mini/assets")
    shutil.copy(ROOT / "pyproject.toml", folder)
    recipes = list(RECIPE.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    for recipe in recipes:
        path = folder / recipe["path"]
        assert path.parent.is_dir() and not path.exists()
        path.write_text(recipe["file"], encoding="utf-8")
    return folder, recipes


def run(folder, words):
    """``python -m ...`` in the copy."""
    assert words[0] == "python"
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_there_is_a_recipe_for_every_family_and_for_a_task(copy):
    folders = [str(pathlib.PurePath(recipe["path"]).parent) for recipe in copy[1]]
    assert sorted(folders) == sorted([*(f"ddpo_jax/{family}" for family in find.FAMILIES), "configs"])


def test_every_member_passes_the_tests_that_its_recipe_names(copy):
    """The five commands in one process: five would spend most of their time on imports."""
    folder, recipes = copy
    commands = [shlex.split(recipe["command"]) for recipe in recipes if " pytest " in recipe["command"]]
    assert commands and all(words[:3] == ["python", "-m", "pytest"] and words[4] == "-k" for words in commands)
    output = run(
        folder,
        ["python", "-m", "pytest", "-v", "-p", "no:cacheprovider", *[words[3] for words in commands], "-k"]
        + [" or ".join(words[5] for words in commands)],
    )
    for words in commands:
        passed = [line for line in output.splitlines() if words[5] in line and "PASSED" in line]
        assert passed and all(line.startswith(words[3]) for line in passed), output
    assert sum("my_algorithm" in line and "PASSED" in line for line in output.splitlines()) > 10
    assert "skipped" not in output


def test_a_run_uses_them_all(copy, tmp_path):
    """The command of the task's recipe, on a model of a few thousand weights."""
    folder, recipes = copy
    (command,) = (recipe["command"] for recipe in recipes if "ddpo_jax.main" in recipe["command"])
    model = tiny.tiny_pipeline_folder(tmp_path / "model", unet=tiny.SMALLEST_UNET)
    settings = {key: value for key, value in tiny.settings(model).items() if not key.startswith("prompts.")}
    settings |= {"prompts.samples_per_prompt": 2, "replay.k": 1, "prompts.colour": "green"}
    words = [*shlex.split(command), f"--workdir={tmp_path / 'run'}"]
    run(folder, words + [f"--config.{key}={value}" for key, value in settings.items()])
    rows = metrics.read_metrics(tmp_path / "run")
    assert [row["reward_queries"] for row in rows] == [8, 16]
    for row in rows:
        assert row["reward/mean"] == pytest.approx(row["reward/brightness"] - 0.9, abs=1e-5)  # no image is that bright
        assert row["train/grad_norm"] > 0
    assert rows[1]["replay/samples"] > rows[0]["replay/samples"] == 0
    with Image.open(tmp_path / "run" / "samples" / "before_after.png") as picture:
        assert picture.width > 500
