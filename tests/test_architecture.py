"""The house rules, read from the source: which room may import which, and what no file may contain."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ddpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
OURS = ("ddpo_jax", "configs", "tests")
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))

# A room (a folder or a module of the package) imports rooms of lower layers only, so never a sibling.
LAYERS = [
    {"types"},
    {"ops", "weights", "sharding", "find", "errors", "keys", "grid", "liveness"},
    {"cli", "curves"},
    {"diffusion", "models", "checkpoint", "metrics", "serving"},
    {"mini", "feedback"},
    {"algorithms", "weighting", "replay", "rewards", "prompts"},
    {"learner", "config", "reward_runner"},
    {"batching", "rollout", "validate", "value", "presets"},
    {"build"},
    {"epoch", "workdir", "trained", "random_model"},
    {"train", "capacity"},
    {"main", "benchmark", "sample", "evaluate", "export", "compare"},
    {"commands"},
    {"measure", "sweep"},  # one takes a config as main does, the other compares
]
LAYER = {room: number for number, layer in enumerate(LAYERS) for room in layer}
# Rooms that may import less than their layer allows: this, and nothing else of the package.
ONLY = {
    "find": set(),
    "ops": {"types"},
    "weights": {"types"},
    "sharding": {"types"},
    "diffusion": {"types", "ops"},
    "models": {"types", "weights"},
    "checkpoint": {"types"},
    "metrics": {"types", "grid"},
    "algorithms": {"types", "ops"},  # never a network, a config file or a device
    "weighting": {"types", "diffusion"},
    "replay": {"types"},
    "serving": {"errors"},  # functions are handed to it
    "feedback": {"errors", "serving"},
    "rewards": {"types", "find", "errors", "models", "weights", "mini", "serving", "feedback"},
    "prompts": {"types", "find", "mini"},
    "learner": {"types", "find", "ops", "diffusion", "sharding"},
    "config": {"types", "find", "keys"},
}
# In these folders every file is a thing of its own: files import helpers (__init__.py, _name.py), not one another.
FAMILIES = {"algorithms", "weighting", "replay", "rewards", "prompts"}
HEAVY = {"torch", "transformers", "diffusers", "tensorflow", "peft", "open_clip"}  # tests only


def imports(path):
    """Dotted names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module if node.level == 0 else ".".join(path.relative_to(ROOT).parts[: -node.level])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def faults_of(path, names):
    """What is wrong with a file of the package that imports ``names``."""
    room, faults = room_of(path), []
    for name in sorted(names):
        top, *rest = name.split(".")
        if top in HEAVY:
            faults.append(f"imports {top}")
        if top != "ddpo_jax" or not rest:
            continue
        other = rest[0]
        if other not in LAYER:
            faults.append(f"imports {name}, which is in no layer of this test")
        elif other == room:
            if room in FAMILIES and len(rest) > 1 and rest[1][0] != "_" and (PACKAGE / room / f"{rest[1]}.py").exists():
                faults.append(f"imports its sibling {name}")
        elif room in ONLY and other not in ONLY[room]:
            faults.append(f"imports {name}; may import {sorted(ONLY[room])}")
        elif LAYER[other] >= LAYER[room]:
            faults.append(f"imports {name} of a layer that is not below its own")
    return faults


def test_every_room_is_in_a_layer():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= LAYER.keys(), f"add to LAYERS: {sorted(rooms - LAYER.keys())}"


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in FILES])
def test_imports_point_one_way(path):
    assert faults_of(path, imports(path)) == []


@pytest.mark.parametrize(
    "path, name, fault",
    [
        ("algorithms/x.py", "ddpo_jax.models.unet", "may import"),
        ("algorithms/x.py", "ddpo_jax.config", "may import"),
        ("algorithms/x.py", "ddpo_jax.algorithms.ddpo", "sibling"),
        ("rewards/x.py", "ddpo_jax.prompts.animals", "may import"),
        ("rollout.py", "ddpo_jax.batching", "not below"),
        ("mini/x.py", "ddpo_jax.train", "not below"),
        ("models/x.py", "torch.nn", "imports torch"),
        ("main.py", "ddpo_jax.nowhere", "in no layer"),
    ],
)
def test_the_rule_catches(path, name, fault):
    (found,) = faults_of(PACKAGE / path, {name})
    assert fault in found
    assert (
        faults_of(PACKAGE / "algorithms/x.py", {"ddpo_jax.ops.surrogate", "ddpo_jax.algorithms._shared", "jax"}) == []
    )


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in CONFIGS])
def test_configs_import_the_config_modules_only(path):
    ours = {name for name in imports(path) if name.split(".")[0] in {"ddpo_jax", "configs"}}
    assert all(name.split(".")[:2] in (["ddpo_jax", "config"], ["ddpo_jax", "presets"]) for name in ours), ours


def test_no_assert_no_scattered_defaults_no_unfinished_marks():
    faults = []
    for path in [*FILES, *CONFIGS]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assert):
                faults.append(f"{where}: assert; a user's error is a ValueError")
            if isinstance(node, ast.Call) and re.search(r"config[\w.]*\.get$", ast.unparse(node.func)):
                faults.append(f"{where}: a default outside default_config()")
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: unfinished")
    assert faults == []


def test_files_are_short_enough_to_find_your_way():
    files = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_every_folder_of_the_package_is_installed():
    """setuptools takes folders with an ``__init__.py``; without one a folder works in a checkout only."""
    assert {path.parent for path in FILES if not (path.parent / "__init__.py").exists()} == set()


def test_no_machine_or_registry_in_a_file():
    pattern = re.compile(r"/(work|root|home)/[a-z]|pypi\.(org|python)|pythonhosted|download\.pytorch")
    files = [path for folder in (*OURS, "launch", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.suffix in {".py", ".toml", ".md", ".yaml"}]
    faults = []
    for path in files:
        if path.suffix in {".py", ".sh", ".toml", ".md", ".yaml", ""} and path != pathlib.Path(__file__).resolve():
            faults += [
                f"{path}: {line.strip()}" for line in path.read_text("utf-8").splitlines() if pattern.search(line)
            ]
    assert faults == []
