"""The presets carry the papers' numbers; presets and sweeps resolve and are valid; the rule for the miniature."""

import pathlib
import re
import runpy

import numpy as np
import pytest

from ddpo_jax import find
from ddpo_jax.config import keys, presets
from ddpo_jax.config.file import load_file
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.studies import compare

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAPERS = ROOT / "configs" / "papers"
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
VARIED = ("replay_rules", "iskl", "prdp", "setting", "efficient")  # sweeps whose learning rates differ on purpose

SHARED = {"sample.eta": 1.0, "sample.guidance_scale": 5.0, "train.weight_decay": 1e-4, "train.max_grad_norm": 1.0}
# Copied from the papers, not from the presets. "images" is per epoch.
NUMBERS = {
    "selective_timestep.py": {
        **{"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sample.num_steps": 20, "train.learning_rate": 3e-5},
        **{"images": 5 * 4, "train.batch_size": 4, "train.lora_rank": 4, "replay.k": 4, "replay.history": 3},
        **{"replay.name": "hard", "weighting.name": "latent_change_squared", "algorithm.name": "ddpo"},
        **{"train.adam_b1": 0.9, "train.adam_b2": 0.999, "prompts.name": "animals"},
        **{"train.adv_clip_max": 5.0, "train.timestep_fraction": 1.0, "replay.updates": "one"},
    },
    "selective_timestep.py:algorithm=dpok,weighting=uniform,replay=none": {
        **{"algorithm.name": "dpok", "replay.name": "none", "weighting.name": "uniform", "train.learning_rate": 3e-5},
        **{"algorithm.reward_weight": 1000.0, "images": 20},
    },
    "selective_timestep.py:algorithm=b2_diffurl": {"algorithm.clip_range": 0.1, "algorithm.history": 8, "images": 20},
    "ddpo.py": {
        **{"model": "CompVis/stable-diffusion-v1-4", "images": 256, "train.batch_size": 64, "sample.num_steps": 50},
        **{"train.learning_rate": 1e-5, "train.lora_rank": 0, "train.clip_range": 1e-4, "algorithm.name": "ddpo"},
    },
    "ddpo.py:algorithm=ddpo_sf": {"images": 256, "train.batch_size": 256, "train.learning_rate": 1e-5},
    "rwr.py": {
        **{"images": 256, "algorithm.temperature": 0.2, "algorithm.softmax_over": "batch", "sample.num_steps": 50},
        **{"algorithm.reward_unit": "reward", "prompts.samples_per_prompt": 1},
    },
    "rwr.py:reward=aesthetic": {"algorithm.softmax_over": "prompt", "prompts.samples_per_prompt": 4, "images": 256},
    "rwr.py:algorithm=rwr_sparse": {"algorithm.threshold": 90.0, "algorithm.threshold_by": "percentile"},
    "loop.py": {
        **{"prompts.samples_per_prompt": 4, "train.batch_size": 8 * 4, "train.learning_rate": 1e-5},
        **{"sample.num_steps": 50, "train.clip_range": 1e-4, "train.lora_rank": 0, "algorithm.name": "loop"},
    },
    "loop.py:prompts.samples_per_prompt=2": {"prompts.samples_per_prompt": 2, "train.batch_size": 32},
    "loop.py:prompts.samples_per_prompt=3": {"prompts.samples_per_prompt": 3, "train.batch_size": 24},
    "loop.py:algorithm=ddpo": {"prompts.samples_per_prompt": 1, "train.batch_size": 32, "images": 128},
    "loop.py:algorithm=reinforce": {"prompts.samples_per_prompt": 1, "train.batch_size": 128, "images": 128},
    "loop.py:algorithm=reinforce_bc": {"train.batch_size": 128, "images": 128},
    "prdp.py": {  # Deng et al. 2024, section 4.4
        **{"model": "CompVis/stable-diffusion-v1-4", "num_epochs": 250, "images": 32 * 16, "sample.num_steps": 50},
        **{"prompts.samples_per_prompt": 16, "algorithm.kl_coef": 10.0, "prompts.template": "{animal}"},
        **{"train.lora_rank": 0, "algorithm.log_prob_reduction": "mean", "algorithm.reward_unit": "reward"},
    },
    "prdp.py:reward=clip_score": {
        **{"num_epochs": 100, "images": 512, "prompts.template": "A painting of a {animal}"},
        **{"algorithm.kl_coef": 25.0, "algorithm.reward_unit": "deviation"},  # no beta in the paper
    },
    "prdp.py:algorithm=ddpo": {"num_epochs": 250, "images": 512, "train.batch_size": 128, "train.num_inner_epochs": 1},
    "prdp.py:reward=hps,reward.version=v2,algorithm.refresh_every=0,algorithm.proximal=False": {
        **{"algorithm.refresh_every": 0, "reward.version": "v2", "num_epochs": 100, "images": 512},
    },
    "prdp_large.py:prompts.path=hpd.txt": {
        **{"num_epochs": 1000, "images": 64 * 8, "prompts.samples_per_prompt": 8, "prompts.path": "hpd.txt"},
    },
    "prdp_large.py:algorithm=ddpo,prompts.path=hpd.txt": {"images": 512, "train.batch_size": 128},
    "ddpo_iskl.py": {
        **{"images": 8, "train.num_inner_epochs": 2, "train.batch_size": 8, "train.learning_rate": 3e-4},
        **{"train.clip_range": 1e-4, "train.adam_eps": 1e-8, "sample.num_steps": 50, "train.lora_rank": 4},
    },
    "ddpo_iskl.py:algorithm=ddpo": {"images": 8, "train.num_inner_epochs": 2, "algorithm.name": "ddpo"},
    "ddpo_iskl.py:algorithm=ddpo_sf": {"images": 16, "train.batch_size": 16, "train.num_inner_epochs": 4},
    "ddpo_iskl.py:train.learning_rate=3e-3": {"train.learning_rate": 3e-3},
}


def resolved(name: str, *overrides: tuple[str, str], backend: str = "gpu"):
    file, colon, choices = name.partition(".py:")
    path = pathlib.Path(file + ".py") if colon else pathlib.Path(name)
    config = load_file(PAPERS / path, choices)
    override(config, overrides)
    return make_ready(config, backend, 1).config


def with_images(config):
    flat = keys.flatten(config)
    return flat | {"images": config.sample.batch_size * config.sample.num_batches_per_epoch}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_preset_carries_the_papers_numbers(name):
    found = with_images(resolved(name))
    wanted = SHARED | NUMBERS[name]
    assert {key: found[key] for key in wanted} == wanted


def test_every_preset_is_in_the_table():
    assert {path.name for path in PAPERS.glob("*.py")} == {name.partition(".py")[0] + ".py" for name in NUMBERS}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_preset_runs_on_the_miniature(name):
    file, _, choices = name.partition(".py:")
    choices = ",".join(c for c in choices.removeprefix(".py").split(",") if c and "path" not in c)
    name = file.removesuffix(".py") + ".py:model=mini" + ("," + choices if choices else "")
    config = resolved(name, backend="cpu")
    found = with_images(config)
    assert found["model"] == "mini" and found["prompts.name"] == "mini" and found["train.lora_rank"] == 8
    assert found["sample.num_steps"] == 10 and found["train.clip_range"] == pytest.approx(8e-4)
    assert found["images"] <= 64 and 1500 <= found["images"] * found["num_epochs"] < 1500 + found["images"]
    assert found["sample.guidance_scale"] == 1.0


@pytest.mark.parametrize(
    "name, rate",
    [  # 9e-3 sqrt(images of an update / 64), by hand; 3e-3 for the verifier
        ("selective_timestep.py:model=mini", 2.25e-3),
        ("ddpo.py:model=mini", 4.5e-3),
        ("ddpo.py:model=mini,reward=mini_verifier", 1.5e-3),
        ("ddpo.py:model=mini,algorithm=ddpo_sf", 4.5e-3),
        ("prdp.py:model=mini", 1.125e-3),  # a quarter of DDPO's
        ("prdp.py:model=mini,algorithm=ddpo", 4.5e-3),
        ("ddpo_iskl.py:model=mini", 4.5e-3),
        ("loop.py:model=mini", 1.83711731e-3),
        ("loop.py:model=mini,algorithm=reinforce", 1.83711731e-3),
    ],
)
def test_learning_rates_of_the_miniature(name, rate):
    assert resolved(name, backend="cpu").train.learning_rate == pytest.approx(rate, rel=1e-6)


def test_the_argument_has_the_last_word_on_the_miniature_too():
    config = resolved(
        "selective_timestep.py:train.learning_rate=1e-3,model=mini,num_epochs=7,replay.k=8", backend="cpu"
    )
    assert (config.train.learning_rate, config.num_epochs, config.replay.k) == (1e-3, 7, 8)


def test_the_argument_is_split_into_model_members_and_the_rest():
    arg = "num_epochs=3,model=mini,reward=aesthetic,replay.name=hard,replay.k=2,train.lora_targets=(a,b)"
    parts = ("model=mini", "reward=aesthetic,replay.name=hard", "num_epochs=3,replay.k=2,train.lora_targets=(a,b)")
    assert presets.split(arg) == parts


@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in SWEEPS])
def test_a_sweep_resolves_is_sized_for_the_miniature_and_compares_like_with_like(file):
    plan = runpy.run_path(str(file))
    doc = " ".join(plan["__doc__"].split())
    assert doc.startswith("Claim: ") and re.search(r"Source: [A-Z\"].*(20\d\d|\(anonymous\)),", doc) and "Show: " in doc
    by_panel = {}
    for run in plan["runs"]():
        overrides = [(key, str(value)) for key, value in run.items() if key not in ("panel", "name", "config")]
        config = resolved(f"../sweeps/{run['config']}", *overrides, backend="cpu")
        assert (file.parent / run["config"].partition(":")[0]).is_file()
        by_panel.setdefault(run["panel"], []).append(config)
    for panel in by_panel.values():
        flat = [with_images(config) for config in panel]
        queries = {c["images"] * c["num_epochs"] for c in flat}
        if file.stem == "efficient":  # DDPO's end is what is to be reached in fewer
            assert queries in ({400, 1536}, {1024, 1536})
        else:
            assert max(queries) - min(queries) <= 64 and (min(queries) < 1600 or min(queries) in (3840, 5120))
        for key in ("sample.num_steps", "reward.name", "prompts.name", "sample.guidance_scale", "train.max_grad_norm"):
            assert len({c[key] for c in flat}) == 1
        rates = {c["train.learning_rate"] for c in flat}
        assert len(rates) == 1 or file.stem in VARIED
        groups = compare.group([compare.Run(file, keys.flatten(config), []) for config in panel])
        assert len(groups) == len(panel)  # no two runs are the same but for the seed
    for panel in by_panel:
        assert plan["BASELINE"] in {run["name"] for run in plan["runs"]() if run["panel"] == panel}


@pytest.mark.parametrize("preset", ["prdp_large.py:prompts.path=hpd.txt,", "prdp_large.py:model=mini,"])
def test_on_many_prompts_ddpo_has_the_statistics_of_the_whole_batch(preset):
    """Of a prompt that is drawn once there are 8 images, fewer than min_count, on either model."""
    config = resolved(preset + "algorithm=ddpo", backend="cpu" if "mini" in preset else "gpu")
    assert config.prompts.samples_per_prompt == 8 < config.algorithm.min_count == 16
    rewards, ids = np.arange(16.0), np.repeat([3, 4], 8)
    found = find.find("algorithms", "ddpo").advantages(rewards, ids, PromptStats(), config.algorithm)
    np.testing.assert_allclose(found, (rewards - 7.5) / np.sqrt(255 / 12), rtol=1e-5)  # variance of 0 to 15
    few = resolved("prdp.py:model=mini,algorithm=ddpo", backend="cpu")
    assert few.prompts.samples_per_prompt == 16 > few.algorithm.min_count == 4


@pytest.mark.parametrize(("argument", "backend"), [("", "gpu"), (":model=mini", "cpu")])
def test_the_recipe_makes_an_update_of_every_pair_of_images_of_one_prompt(argument, backend):
    config = resolved(f"../efficient.py{argument}", backend=backend)
    assert with_images(config)["images"] == config.train.batch_size == config.prompts.samples_per_prompt == 2
    assert config.train.timestep_fraction == 1 and config.num_epochs * 2 == 400
    assert (config.algorithm.name, config.weighting.name) == ("ddpo", "latent_change_squared")
    assert config.train.learning_rate == pytest.approx(9e-3 * (2 / 64) ** 0.5 if backend == "cpu" else 3e-5)


def test_the_larger_rate_of_the_replay_sweep_is_that_of_one_more_update():
    """20 images in updates of 4 are 5 updates, and replay is one more."""
    plan = runpy.run_path(str(ROOT / "configs" / "sweeps" / "replay_rules.py"))
    (run,) = [run for run in plan["runs"]() if (run["panel"], run["name"]) == ("aesthetic", "larger_learning_rate")]
    plain = resolved("selective_timestep.py:model=mini,replay=hard,reward=aesthetic", backend="cpu")
    assert with_images(plain)["images"] // plain.train.batch_size == 5 and plain.replay.updates == "one"
    assert run["train.learning_rate"] == pytest.approx(plain.train.learning_rate * 6 / 5)


def test_the_iskl_sweep_compares_the_penalty_alone():
    """Gao et al. 2025, Algorithms 4 and 5: all else is the same, advantages and trained steps included."""
    plan = runpy.run_path(str(ROOT / "configs" / "sweeps" / "iskl.py"))
    by_name = {run["name"]: run["config"] for run in plan["runs"]() if run["panel"] == "aesthetic"}
    found = [
        keys.flatten(resolved(by_name[name].removeprefix("../papers/"), backend="cpu"))
        for name in ("ddpo", "ddpo_iskl")
    ]
    differ = {key for key in found[0].keys() | found[1].keys() if found[0].get(key) != found[1].get(key)}
    options = ("name", "kl_coef", "log_prob_reduction", "penalty_clip", "penalty_baseline")
    assert differ == {f"algorithm.{key}" for key in options}
    assert not (found[1]["algorithm.penalty_clip"] or found[1]["algorithm.penalty_baseline"])
    assert found[0]["train.timestep_fraction"] == 1.0 and found[0]["algorithm.min_count"] == 4


def test_every_row_of_the_evidence_has_a_sweep():
    assert {file.stem for file in SWEEPS} == {
        "weighting_and_replay",
        "policy_gradients",
        "policy_gradients_by_category",
        "weighting_schemes",
        "replay_rules",
        "other_algorithms",
        "quickstart",
        "setting",  # on which all others rest
        "efficient",  # the recipe
        "generalization",
        "policy_gradient_or_regression",
        "prdp",
        "iskl",
    }
