"""Config: every key documented, members, overrides as text, what depends on the model, rules, resuming."""

import re

import pytest
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.config import choose, default_config, keys, with_choices
from ddpo_jax.config.defaults import BY_NAME, FAMILIES, KEYS, STABLE_DIFFUSION
from ddpo_jax.config.keys import from_json, to_json
from ddpo_jax.config.model import default_clip_range
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.config.resolve import resolve
from ddpo_jax.workdir.folder import diff_that_matters

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


# ---- defaults ----


def test_every_key_has_a_meaning_and_is_in_the_config_once():
    assert len({key.name for key in KEYS}) == len(KEYS)
    own = {key for key in keys.flatten(default_config()) if key not in BY_NAME}
    assert all(FAMILY_KEYS.match(key) for key in own)  # options of the default members
    assert set(BY_NAME) <= set(keys.flatten(default_config()))
    assert all(len(key.meaning) > 10 for key in KEYS)


def test_keys_others_script_against():
    design = """seed num_epochs model sample.num_steps sample.eta sample.guidance_scale sample.batch_size
        sample.num_batches_per_epoch train.batch_size train.learning_rate train.num_inner_epochs train.clip_range
        train.adv_clip_max train.timestep_fraction train.lora_rank algorithm.name weighting.name replay.name replay.k
        replay.history reward.name prompts.name prompts.samples_per_prompt mesh.data mesh.fsdp checkpoint.every
        checkpoint.keep""".split()
    assert not set(design) - set(keys.flatten(default_config()))


def test_locked_and_typed():
    config = default_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.train.learnin_rate = 1.0
    with pytest.raises(TypeError):
        config.train.max_grad_norm = "large"


def test_model_and_everything_with_it_follow_the_machine():
    cpu, gpu = made(), made(backend="gpu")
    assert (cpu.model, cpu.prompts.name, cpu.dtype, cpu.train.lora_rank) == ("mini", "mini", "float32", 8)
    assert (gpu.model, gpu.prompts.name, gpu.dtype) == (STABLE_DIFFUSION, "animals", "bfloat16")
    assert (gpu.sample.num_steps, gpu.train.lora_rank) == (50, 4)
    assert made("model=mini", backend="gpu").dtype == "float32"
    assert made("model=a/b").sample.num_steps == 50  # a hub id has Stable Diffusion's defaults on any machine
    assert {key for key, value in keys.flatten(gpu).items() if value is None} == set()
    assert gpu.train.clip_range == pytest.approx(1e-4) and cpu.train.clip_range == pytest.approx(8e-4)


def test_resolve_keeps_what_is_given_and_its_argument():
    config = default_config()
    override(config, [("sample.num_steps", "7"), ("prompts.name", "animals"), ("dtype", "bfloat16")])
    resolved, _ = resolve(config, "cpu")
    assert (resolved.sample.num_steps, resolved.prompts.name, resolved.dtype) == (7, "animals", "bfloat16")
    assert config.model == "auto" and config.sample.batch_size is None
    assert resolve(resolved, "gpu")[0] == resolved


def test_a_folder_of_the_miniatures_size_gets_its_defaults(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet/config.json").write_text('{"sample_size": 8, "in_channels": 4}')
    assert made(f"model={tmp_path}").prompts.name == "mini"
    (tmp_path / "unet/config.json").write_text('{"sample_size": 64, "in_channels": 4}')
    assert made(f"model={tmp_path}").prompts.name == "animals"
    (tmp_path / "unet/config.json").write_text("{")
    with pytest.raises(ValueError, match="unet/config.json: it cannot be read as JSON"):
        checked(f"model={tmp_path}")
    for size in ("0", "-8", "8.5", '"8"', "[8]", "[8, 8, 8]", "null", "true"):
        (tmp_path / "unet/config.json").write_text(f'{{"sample_size": {size}, "in_channels": 4}}')
        with pytest.raises(ValueError, match="unet/config.json sample_size: received .*whole number above 0"):
            checked(f"model={tmp_path}")


def test_default_clip_range_by_hand():
    assert default_clip_range(64 * 64 * 4) == pytest.approx(1e-4)  # the usual value at SD's latents
    assert default_clip_range(8 * 8 * 4) == pytest.approx(8e-4)  # 64 times fewer dimensions: 8 times the noise


@pytest.mark.parametrize("backend, devices", [("cpu", 1), ("cpu", 8), ("gpu", 1), ("tpu", 8)])
@pytest.mark.parametrize("name", find.available("algorithms"))
def test_every_algorithm_runs_with_the_defaults(name, backend, devices):
    checked(f"algorithm.name={name}", backend=backend, devices=devices)


def test_default_batches():
    assert made().train.batch_size == 64  # 32 x 4 images in 2 updates
    assert made(devices=8).train.microbatch_size == 8  # 64 / 8 devices, at most 32
    assert made(backend="gpu").train.batch_size == 64  # 8 x 32 images in 4 updates
    few = "sample.batch_size=4", "sample.num_batches_per_epoch=1"
    assert made(*few, backend="gpu").train.batch_size == 4  # 1 is a part of a group
    assert made("algorithm.name=ddpo_sf", backend="gpu").train.batch_size == 256  # no importance ratio: one update


def test_coupled_losses_train_all_steps_by_default():
    assert made().train.timestep_fraction == 0.3
    assert made("algorithm.name=prdp").train.timestep_fraction == 1.0
    assert made(backend="gpu").train.timestep_fraction == 1.0


def test_on_a_cpu_as_many_cores_work_as_split_the_batches():
    assert made(devices=8).mesh.data == 8
    assert made("sample.batch_size=12", devices=8).mesh.data == 6  # 12 x 4 images, two updates of 24
    assert made("sample.batch_size=12", "train.microbatch_size=12", devices=8).mesh.data == 2  # 24 / 12 microbatches
    assert made("mesh.fsdp=2", devices=8).mesh.data == 4
    assert made("mesh.data=2", devices=8).mesh.data == 2
    assert made("mesh.data=2", devices=8).train.microbatch_size == 32  # of 32 images
    assert made(devices=8, backend="gpu").mesh.data == -1
    old, new = made(devices=2), made(devices=8)
    assert old != new and diff_that_matters(old, new) == []


def test_auto_options_of_a_member_follow_the_model(own):
    name = own(
        "auto", "AUTO = {'weights': ('small', 'big')}\ndef default_config(): return ConfigDict({'weights': 'auto'})\n"
    )
    assert made(f"reward.name={name}").reward.weights == "small"
    assert made(f"reward.name={name}", backend="gpu").reward.weights == "big"
    assert made(f"reward.name={name}", "reward.weights=mine").reward.weights == "mine"


# ---- members ----


def test_choose_leaves_nothing_of_the_former_member(own):
    first = own("first", "def default_config(): return ConfigDict({'only_first': 1})\n")
    second = own("second", "def default_config(): return ConfigDict({'only_second': 2.0})\n")
    config = default_config()
    config.prompts.samples_per_prompt = 6
    for family in ("prompts", "reward"):
        choose(config, family, first)
        assert config[family].only_first == 1
        choose(config, family, second)
    assert config.reward.to_dict() == {"name": second, "only_second": 2.0, "wait_s": 600.0}
    assert config.prompts.to_dict() == {"name": second, "only_second": 2.0, "samples_per_prompt": 6}
    assert config.is_locked and config.reward.is_locked


def test_choose_refuses(own):
    config = default_config()
    with pytest.raises(ValueError, match="^algorithm.name: received 'dddpo'.*Did you mean 'ddpo'"):
        choose(config, "algorithm", "dddpo")
    with pytest.raises(ValueError, match="unknown section 'rewards'.*reward"):
        choose(config, "rewards", "aesthetic")
    clash = own("clash", "def default_config(): return ConfigDict({'samples_per_prompt': 1})\n")
    with pytest.raises(ValueError, match="^prompts.name: received .*'samples_per_prompt'"):
        choose(config, "prompts", clash)


# ---- overrides ----


@pytest.mark.parametrize(
    "text, value",
    [
        ("seed=3", 3),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("train.clip_range=2e-4", 2e-4),
        ("train.clip_range=none", None),
        ("mesh.data=-1", -1),
        ("train.stop_uncond_gradient=True", True),
        ("train.stop_uncond_gradient=0", False),
        ("revision=123", "123"),
        ("model=./a=b", "./a=b"),
    ],
)
def test_override_follows_the_declared_type(text, value):
    config = default_config()
    key, text = text.split("=", 1)
    override(config, [(key, text)])
    assert keys.get(config, key) == value and type(keys.get(config, key)) is type(value)


def test_override_of_a_members_options(own):
    name = own("reward", "def default_config(): return ConfigDict({'sizes': (1, 2), 'parts': ('a',), 'free': None})\n")
    config = default_config()
    pairs = [("reward.sizes", "(3,4,5)"), ("reward.parts", "b, 'c'"), ("reward.free", "[1, 2]"), ("reward.name", name)]
    override(config, pairs)  # the name comes last and still counts first
    assert config.reward.sizes == (3, 4, 5)
    assert config.reward.parts == ("b", "'c'")
    assert config.reward.free == [1, 2]


@pytest.mark.parametrize(
    "text, line",
    [
        ("train.learnin_rate=1", "unknown key 'train.learnin_rate': nearest is 'train.learning_rate'"),
        ("learning_rate=1", "unknown key 'learning_rate': nearest is 'train.learning_rate'"),
        ("sample.seed=1", "unknown key 'sample.seed': nearest is 'seed'"),
        ("train=1", "unknown key 'train': it is a section; its keys are train.adam_b1"),
        ("algorithm.zzz=1", "algorithm.name is 'ddpo', whose keys are algorithm.buffer_size"),
        ("prompts.split=novel", "prompts.name is 'auto'"),
        ("seed=1.5", "seed: received '1.5'; it must be a whole number; write for example seed=0"),
        ("sample.batch_size=many", "sample.batch_size: received 'many'; it must be a whole number"),
        ("train.learning_rate=fast", "train.learning_rate: received 'fast'; it must be a number"),
        ("train.stop_uncond_gradient=yes", "train.stop_uncond_gradient: received 'yes'; it must be true or false"),
        ("reward.name=jpeg", "reward.name: received 'jpeg'"),
        ("seed=none", "seed: received 'none'"),
    ],
)
def test_override_refuses_in_one_line(text, line):
    with pytest.raises(ValueError) as error:
        override(default_config(), [tuple(text.split("=", 1))])
    assert len(lines(error)) == 1 and line in lines(error)[0]


def test_override_reports_every_fault_and_applies_none_silently():
    with pytest.raises(ValueError) as error:
        made("seeed=1", "seed=x", "algorithm.name=nothing", "train.adam_b1=0.5")
    assert [line.split(":")[0] for line in lines(error)] == ["algorithm.name", "unknown key 'seeed'", "seed"]


def test_with_choices():
    config = with_choices(default_config(), "algorithm=loop, train.learning_rate=1e-4,reward=jpeg_incompressibility")
    assert (config.algorithm.name, config.train.learning_rate) == ("loop", 1e-4)
    assert config.reward.name == "jpeg_incompressibility"
    assert with_choices(default_config(), "") == default_config()
    with pytest.raises(ValueError, match="^config argument: received 'loop'; it must be key=value"):
        with_choices(default_config(), "loop")


def test_split_respects_brackets_and_quotes():
    assert keys.split("a=(1,2), b=[x,(y,z)],,c='p,q'") == ["a=(1,2)", "b=[x,(y,z)]", "c='p,q'"]


# ---- a config file's own values ----


def test_resolve_refuses_made_up_keys_and_types():
    config = default_config()
    config.sample.batch_size = "32"  # None is of no type, so ml_collections lets this pass
    config.seed = True
    with config.unlocked():
        config.train.learnin_rate = 1.0
        del config.log["num_images"]
    with pytest.raises(ValueError) as error:
        resolve(config, "cpu")
    text = "\n".join(lines(error))
    assert len(lines(error)) == 4
    assert "log.num_images: received nothing" in text
    assert "sample.batch_size: received '32' (str); it must be a whole number" in text
    assert "seed: received True (bool); it must be a whole number" in text
    assert "unknown key 'train.learnin_rate': nearest is 'train.learning_rate'" in text


def test_resolve_turns_whole_numbers_into_declared_numbers():
    config = default_config()
    config.train.learning_rate = 1
    assert type(resolve(config, "cpu")[0].train.learning_rate) is float


# ---- config.json ----


def test_json_round_trip(own):
    name = own("tuples", "def default_config(): return ConfigDict({'sizes': (1, (2, 3)), 'deep': {'x': 1.5}})\n")
    config = made(f"reward.name={name}")
    again = from_json(to_json(config))
    assert again == config and again.is_locked and again.reward.sizes == (1, (2, 3))
    assert to_json(again) == to_json(config)
    with pytest.raises(ValueError, match=r"^config.json: line 1"):
        from_json("{")
    with pytest.raises(ValueError, match=r"^config.json: received list"):
        from_json("[]")


def test_what_a_resumed_run_may_change():
    old = made("num_epochs=10")
    free = ["num_epochs=20", "log.num_images=4", "log.images_every=0", "checkpoint.every=5", "checkpoint.keep=9"]
    assert diff_that_matters(old, made(*free)) == []
    assert diff_that_matters(old, old) == []
    (shorter,) = diff_that_matters(old, made("num_epochs=5"))
    assert shorter.startswith("num_epochs: received 5, but the run in this folder has 10; it may only grow")
    changed = diff_that_matters(old, made("num_epochs=10", "seed=1", "algorithm.name=prdp"))
    named = {line.split(":")[0] for line in changed}
    assert {"seed", "algorithm.name", "algorithm.ratio_level", "train.timestep_fraction"} <= named
    assert "algorithm.ratio_level: received 'absent', but the run in this folder has 'step'" in "\n".join(changed)


def test_people_are_asked_for_no_evaluation_unless_they_are_meant_to():
    config = default_config()
    override(config, [("model", "mini"), ("reward.name", "human")])
    assert resolve(config, "cpu")[0].log.evaluate_every == 0
    override(config, [("log.evaluate_every", "5")])
    assert resolve(config, "cpu")[0].log.evaluate_every == 5
    override(config, [("reward.name", "jpeg_compressibility")])
    config.log.evaluate_every = None
    assert resolve(config, "cpu")[0].log.evaluate_every == 10


def test_log_probs_that_nobody_reads_are_not_recomputed():
    config = default_config()
    override(config, [("model", "mini"), ("dtype", "bfloat16")])
    assert resolve(config, "cpu")[0].train.recompute_log_prob == "on"
    override(config, [("algorithm.name", "rwr")])
    assert resolve(config, "cpu")[0].train.recompute_log_prob == "off"
