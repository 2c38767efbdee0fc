"""Which values of a config go together: every fault is one line, and all of them are reported at once."""

import re

import pytest
from ml_collections import ConfigDict

from ddpo_jax.config import default_config, keys
from ddpo_jax.config.defaults import FAMILIES
from ddpo_jax.config.override import declared_type, override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.config.resolve import resolve
from ddpo_jax.config.validate import RULES
from ddpo_jax.errors import InputError

FAMILY_KEYS = re.compile(rf"({'|'.join(FAMILIES)})\.")


def lines(error: pytest.ExceptionInfo) -> list[str]:
    return str(error.value).splitlines()


def checked(*overrides: str, backend: str = "cpu", devices: int = 1) -> ConfigDict:
    config = default_config()
    override(config, [tuple(text.split("=", 1)) for text in overrides])
    return make_ready(config, backend, devices).config


def made(*overrides: str, backend: str = "cpu", devices: int = 1) -> ConfigDict:
    config = default_config()
    override(config, [tuple(text.split("=", 1)) for text in overrides])
    return resolve(config, backend, devices)[0]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's own and returns its dotted name."""
    folder = tmp_path / f"own_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> str:
        (folder / f"{name}.py").write_text("from ml_collections import ConfigDict\n" + text)
        return f"{folder.name}.{name}"

    return write


def algorithm(**declared) -> str:
    arguments = "".join(f", {key}={value}" for key, value in declared.items())
    return (
        "from ddpo_jax.types import Traits\n"
        "def default_config(): return ConfigDict({'strength': 1.0})\n"
        f"def traits(config): return Traits(terms=frozenset({{'log_prob'}}){arguments})\n"
    )


# ---- rules ----

WRONG = {
    "replay.updates": "some", "log.profile": "4:2", "checkpoint.folder": "s3://bucket/run",
    "dtype": "float16", "attention": "fast", "train.remat": "yes", "train.recompute_log_prob": "yes",
    "sample.num_steps": 1001, "train.timestep_fraction": 1.5, "train.adam_b1": 1.0, "train.ema_decay": 1.0,
    "train.step_sampling": "twice", "train.adv_clip_max": float("nan"), "train.learning_rate": float("inf"),
}  # fmt: skip


@pytest.mark.parametrize("key", RULES)
def test_every_rule_names_its_key_value_and_fix(key):
    config, value = made(), WRONG.get(key, -2)
    keys.put(config, key, float(value) if declared_type(default_config(), key) is float else value)
    with pytest.raises(ValueError) as error:
        make_ready(config, "cpu", 1)
    (line,) = [line for line in lines(error) if line.startswith(f"{key}: received {keys.get(config, key)!r}; ")]
    assert len(line.split("; ")) >= 3


@pytest.mark.parametrize(
    "overrides, devices, key, fixed",
    [
        (["sample.batch_size=30"], 1, "prompts.samples_per_prompt", "use 3"),  # divisors of 30: 3 and 5 are as near
        (["train.batch_size=60"], 1, "train.batch_size", "use 64"),  # of 128 images
        (["train.batch_size=256"], 1, "train.batch_size", "use 128"),
        (["train.batch_size=32", "train.microbatch_size=5"], 1, "train.microbatch_size", "use 4"),
        (["sample.batch_size=12", "mesh.data=8"], 8, "sample.batch_size", "use 16"),
        (["train.batch_size=4", "mesh.data=8"], 8, "train.batch_size", "use 8"),
        (["mesh.data=9"], 8, "mesh.data", "9 x 1 must be at most the 8 devices"),
        (["mesh.fsdp=3"], 8, "mesh.fsdp", "use 2"),
        (["sample.eta=0"], 1, "sample.eta", "no density"),
        (["sample.eta=1.5"], 1, "sample.eta", "use 1.0"),
        (["model=/nowhere/model"], 1, "model", "no such folder"),
        (
            ["model=CompVis/stable-diffusion-v1-4", "reward.name=mini_verifier"],
            1,
            "reward.name",
            "which model='CompVis/stable-diffusion-v1-4' does not draw; use model=mini",
        ),
        (["algorithm.name=loop", "prompts.samples_per_prompt=1"], 1, "prompts.samples_per_prompt", "at least 2"),
        (["algorithm.name=loop", "train.batch_size=2"], 1, "train.batch_size", "use 4"),
        (
            ["algorithm.name=prdp", "train.timestep_fraction=0.5"],
            1,
            "train.timestep_fraction",
            "use train.timestep_fraction=1.0",
        ),
        (
            ["algorithm.name=rwr", "train.recompute_log_prob=on"],
            1,
            "train.recompute_log_prob",
            "use train.recompute_log_prob=auto",
        ),
    ],
)
def test_rules_between_keys(overrides, devices, key, fixed):
    with pytest.raises(ValueError) as error:
        checked(*overrides, devices=devices)
    assert any(line.startswith(f"{key}: received ") and fixed in line for line in lines(error)), str(error.value)


def test_replay_needs_importance_ratios(own):
    rule = own("rule", "def default_config(): return ConfigDict()\n")
    checked(f"replay.name={rule}")
    with pytest.raises(ValueError, match="^replay.name: received .*no importance ratio.*; use replay.name=none"):
        checked(f"replay.name={rule}", "algorithm.name=ddpo_sf")


def test_rules_read_the_traits_of_a_users_algorithm(own):
    name = own("grouped", algorithm(group=True, separable=False))
    overrides = [
        f"algorithm.name={name}",
        "algorithm.strength=2",
        "prompts.samples_per_prompt=1",
        "train.timestep_fraction=0.5",
    ]
    with pytest.raises(ValueError) as error:
        checked(*overrides)
    assert [line.split(":")[0] for line in lines(error)] == ["prompts.samples_per_prompt", "train.timestep_fraction"]


def test_validate_reports_every_fault_at_once():
    overrides = ["seed=-1", "sample.eta=0", "train.batch_size=60", "log.num_images=0", "model=~/nowhere", "mesh.data=3"]
    with pytest.raises(ValueError) as error:
        checked(*overrides)
    found = sorted(line.split(":")[0] for line in lines(error))
    assert found == ["log.num_images", "mesh.data", "model", "sample.eta", "seed", "train.batch_size"]


def test_absurd_sizes_are_refused_at_once():
    """By arithmetic on the number and on the host's memory: nothing of that size is searched or allocated."""
    for size in (1_000_000_007, 10**12):
        with pytest.raises(InputError, match="sample.batch_size: received .*; it must be from 1 to 1048576"):
            checked(f"sample.batch_size={size}")
    with pytest.raises(InputError, match="train.batch_size: received 10000000000; it must be from 1 to 1048576"):
        checked("train.batch_size=10000000000")
    with pytest.raises(InputError, match=r"sample.batch_size: received 1048576; .* GiB of host memory"):
        checked("sample.batch_size=1048576", "sample.num_batches_per_epoch=64", "train.batch_size=1048576")
    with pytest.raises(InputError, match="train.batch_size: received 1048575; it must divide .* use 1048576"):
        checked("sample.batch_size=1048576", "sample.num_batches_per_epoch=1", "train.batch_size=1048575")


@pytest.mark.parametrize("model", ["~nouser/x", "a" * 300 + "/b", "x\0y", "./nowhere", "no hub id", ""])
def test_a_model_that_cannot_be_one_is_one_line(model):
    config = default_config()
    config.model = model
    with pytest.raises(InputError) as error:
        make_ready(config, "cpu", 1)
    assert [line[:16] for line in lines(error)] == ["model: received "]
