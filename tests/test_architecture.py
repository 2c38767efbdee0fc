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

# The rooms of the house, from the roof to the ground: a file imports its own room and rooms further down, never up.
ROOMS = {
    "__main__": "ddpo_jax COMMAND",
    "main": "python -m ddpo_jax.main: training, the fixed entry",
    "commands": "one file a command: flags, help, a call, what is printed",
    "studies": "evidence: evaluate, measure, sweep, compare",
    "perf": "speed and memory",
    "training": "the loop, the updates of an epoch, the learner, what is saved and restored",
    "rollout": "the sampler, the collector, rewards on host threads",
    "algorithms": "family: scores to coefficients",
    "weighting": "family: weight of each denoising step",
    "replay": "family: which past samples are trained again",
    "rewards": "family: images to scores",
    "prompts": "family: what is drawn",
    "feedback": "people's ratings: the queue, the page, the answers",
    "serving": "a reward as a server",
    "mini": "the embedded miniature",
    "diffusion": "schedule, transition, guidance, policy, the scan",
    "ops": "pure functions",
    "models": "networks, diffusers folders, weight files",
    "workdir": "the folder of a run",
    "config": "every key, overrides, validation",
    "sharding": "the mesh",
    "hosts": "many processes as one program",
    "find": "names to modules",
    "types": "the nouns every room shares",
    "errors": "how a run ends other than well",
}
LAYER = {room: number for number, room in enumerate(reversed(ROOMS))}
# Rooms that may import less than their place allows: this (rooms, or one module of a room) and the ground floor (find,
# types, errors).
GROUND = {"find", "types", "errors"}
ONLY = {
    "algorithms": {"ops"},  # never a network, a config file or a device
    "weighting": {"diffusion"},
    "replay": {"hosts"},
    "rewards": {"models", "mini", "ops", "serving", "feedback"},
    "feedback": {"serving"},
    "serving": set(),
    "prompts": {"mini"},
    "diffusion": {"ops", "models.schema"},  # of the networks' room only what a scheduler_config.json may hold
    "ops": set(),
    "workdir": {"config", "hosts"},
    "config": set(),
}
# In these folders every file is a thing of its own: files import helpers (__init__.py, _name.py), not one another.
FAMILIES = {"algorithms", "weighting", "replay", "rewards", "prompts"}
HEAVY = {"torch", "transformers", "diffusers", "tensorflow", "peft", "open_clip", "trl"}  # tests only
# Another library's work, in a process of its own.
PEERS = {PACKAGE / "perf" / f"{name}.py" for name in ("trl_peer", "torch_peer")}


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
        if top in HEAVY and path not in PEERS:
            faults.append(f"imports {top}")
        if top != "ddpo_jax" or not rest:
            continue
        if any(name.startswith(f"ddpo_jax.perf.{peer.stem}") for peer in PEERS):
            faults.append("imports the peer, which is only run")
        other = rest[0]
        if other not in LAYER:
            faults.append(f"imports {name}, which is no room of this test")
        elif other == room:
            if room in FAMILIES and len(rest) > 1 and rest[1][0] != "_" and (PACKAGE / room / f"{rest[1]}.py").exists():
                faults.append(f"imports its sibling {name}")
        elif room in ONLY and not {other, ".".join(rest[:2])} & (ONLY[room] | GROUND):
            faults.append(f"imports {name}; may import {sorted(ONLY[room] | GROUND)}")
        elif LAYER[other] >= LAYER[room]:
            faults.append(f"imports {name}, a room that is not below its own")
    return faults


def test_the_table_has_every_room_and_no_other():
    assert {room_of(path) for path in FILES} - {"__init__"} == LAYER.keys()


def test_a_newcomer_finds_the_way():
    """Few modules at the top, and no folder too full to read at a glance."""
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 6
    folders = {path.parent for folder in OURS for path in (ROOT / folder).rglob("*.py")}
    counts = {str(folder): len({*folder.glob("*.py")} - {folder / "__init__.py"}) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > 16} == {}


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in FILES])
def test_imports_point_one_way(path):
    assert faults_of(path, imports(path)) == []


@pytest.mark.parametrize(
    "path, name, fault",
    [
        ("algorithms/x.py", "ddpo_jax.models.unet", "may import"),
        ("algorithms/x.py", "ddpo_jax.config", "may import"),
        ("config/x.py", "ddpo_jax.models.unet", "may import"),
        ("diffusion/x.py", "ddpo_jax.models.unet", "may import"),
        ("algorithms/x.py", "ddpo_jax.algorithms.ddpo", "sibling"),
        ("rewards/x.py", "ddpo_jax.prompts.animals", "may import"),
        ("rollout/x.py", "ddpo_jax.training.batching", "not below"),
        ("mini/x.py", "ddpo_jax.training.loop", "not below"),
        ("models/x.py", "torch.nn", "imports torch"),
        ("commands/x.py", "ddpo_jax.perf.trl_peer", "imports the peer"),
        ("perf/x.py", "ddpo_jax.perf.torch_peer.Loop", "imports the peer"),
        ("main.py", "ddpo_jax.nowhere", "no room"),
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
    assert all(name.split(".")[:2] == ["ddpo_jax", "config"] for name in ours), ours


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
