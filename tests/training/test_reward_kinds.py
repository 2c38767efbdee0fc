"""Rewards that say how they want to be asked or used, in whole runs: by groups, and standardised one by one."""

import pathlib
import re
import types

import numpy as np
import pytest
import tiny

from ddpo_jax import find
from ddpo_jax.commands import serve
from ddpo_jax.errors import InputError
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.studies import measure
from ddpo_jax.training import epoch
from ddpo_jax.training.build import build
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
OWN = """
def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3))

def redness(images, prompts, metadata):
    return 1e4 * (images[..., 0].astype("f8") - images[..., 1]).mean(axis=(1, 2))

calls = []

def watched(images, prompts, metadata):
    calls.append((len(images), set(prompts)))
    return better(images, prompts, metadata)

watched.groupwise = True
"""
TWO = {"reward.name": "weighted", "reward.rewards": "own_kinds:brightness=1,own_kinds:redness=0.5"}
NAMES = find.available("algorithms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The example of the documentation, with what the tests ask of it."""
    (example,) = [text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "groupwise" in text]
    (tmp_path / "own_kinds.py").write_text(example + OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_kinds

    own_kinds.calls.clear()
    return own_kinds


def values(workdir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics.read_metrics(workdir)]


# ---- group-wise ----


def test_the_example_of_the_documentation_ranks_the_images_of_a_prompt(own):
    images = np.zeros((4, 2, 2, 3), np.uint8) + np.uint8([9, 3, 200, 40])[:, None, None, None]
    assert own.better.groupwise
    np.testing.assert_allclose(own.better(images, ["a"] * 4, [{}] * 4), [1 / 3, 0, 1, 2 / 3])


def test_a_run_asks_for_whole_groups_and_resumes_exactly(folder, tmp_path, own):
    chosen = {"reward.name": "own_kinds:watched", "sample.batch_size": 8, "sample.num_batches_per_epoch": 2}
    chosen |= {"prompts.samples_per_prompt": 4, "train.batch_size": 16}
    train(tiny.tiny_ready(folder, num_epochs=3, **chosen), tmp_path / "whole")
    assert [(count, len(prompts)) for count, prompts in own.calls] == [(4, 1)] * 12  # 3 epochs of 4 groups
    rows = values(tmp_path / "whole")
    assert all(row["reward/mean"] == pytest.approx(0.5) for row in rows)  # of the ranks 0, 1/3, 2/3, 1
    assert all(row["train/grad_norm"] > 0 for row in rows)
    for epochs in (1, 3):
        train(tiny.tiny_ready(folder, num_epochs=epochs, **chosen), tmp_path / "resumed")
    assert values(tmp_path / "resumed") == rows


def test_a_group_of_one_is_refused_before_the_model_is_read(tmp_path, folder):
    ready = tiny.tiny_ready(folder, **{"reward.name": "own_kinds:better", "prompts.samples_per_prompt": 1})
    with pytest.raises(InputError, match=r"'own_kinds:better' compares .*; .*prompts.samples_per_prompt=4 brings 4$"):
        build(ready.with_values({"model": str(tmp_path / "none")}))


def test_where_images_come_one_by_one_it_is_refused(folder):
    with pytest.raises(InputError, match="'own_kinds:better' compares .* here they come one by one"):
        measure.measure(tiny.tiny_ready(folder, **{"reward.name": "own_kinds:better"}), measure.Plan())
    with pytest.raises(InputError, match="'own_kinds:better' compares .* here they come one by one"):
        serve.main(["--reward=own_kinds:better", "--port=0"])


# ---- standardised one by one ----


def by_hand(rewards, ids):
    """z-scores within prompts, in float64."""
    return np.concatenate([(r - r.mean()) / r.std() for r in (rewards[ids == each] for each in np.unique(ids))])


EXPECTED = {  # what becomes of the sum s of z-scores, whose mean is 0 within each prompt of 4 images
    **dict.fromkeys(["ddpo", "ddpo_sf", "ddpo_iskl", "grpo", "b2_diffurl"], lambda s: s / s.std()),
    **dict.fromkeys(["loop", "rloo"], lambda s: s * 4 / 3),
    **dict.fromkeys(["reinforce_bc", "d3po"], lambda s: s),
    "prdp": lambda s: s / s.std(),
}


def assigned(ready, light, red, ids):
    """What ``assign`` makes of a rollout with these scores of the two members."""
    names = ("own_kinds:brightness", "own_kinds:redness")
    n, steps = len(ids), ready.config.sample.num_steps
    parts = types.SimpleNamespace(
        algorithm=ready.members.algorithm,
        traits=ready.members.traits(ready.config),
        trained_steps=np.ones(steps, bool),
        reward=types.SimpleNamespace(decoupled=dict(zip(names, (1.0, 0.5), strict=True))),
    )
    rollout = types.SimpleNamespace(
        latents=np.zeros((n, steps + 1, 1, 1, 1)),
        log_prob=np.zeros((n, steps)),
        context=np.zeros((n, 1, 1)),
        weights=np.ones((n, steps)),
        branch_step=0,
        prompts=["a"] * n,
        prompt_ids=ids,
        group_ids=ids,
        rewards=(light + 0.5 * red).astype(np.float32),
        parts=dict(zip(names, (light, red), strict=True)),
    )
    return epoch.assign(parts, ready.config, PromptStats(), rollout)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_the_sum_or_refuses_it(name, folder):
    """The scale of a reward, and what a prompt's images have in common, do not matter."""
    chosen = TWO | {"reward.normalise": "advantages", "algorithm.name": name, "prompts.samples_per_prompt": 4}
    ready = tiny.tiny_ready(folder, **chosen)
    algorithm = find.find("algorithms", name)
    if not algorithm.traits(ready.config.algorithm).per_prompt:
        assert name not in EXPECTED
        with pytest.raises(InputError, match=f"reward.normalise: received 'advantages'; algorithm '{name}' .*; use"):
            build(ready)
        return
    rng, ids = np.random.default_rng(0), np.repeat([11, 22], 4)
    light, red = rng.normal(size=8), 1e4 * rng.normal(size=8) + np.repeat([3e5, -7e5], 4)
    total = by_hand(light, ids) + 0.5 * by_hand(red, ids)
    found = assigned(ready, light, red, ids)
    np.testing.assert_allclose(found.rewards, total, rtol=1e-4)
    np.testing.assert_allclose(found.advantages, EXPECTED[name](total), rtol=1e-4)


def test_regression_within_a_prompt_has_the_sum_too(folder):
    chosen = TWO | {"reward.normalise": "advantages", "algorithm.name": "rwr", "algorithm.softmax_over": "prompt"}
    ids, light = np.repeat([11, 22], 2), np.array([1.0, 3.0, 5.0, 2.0])  # z-scores -1 1, 1 -1; red alike in each prompt
    found = assigned(tiny.tiny_ready(folder, **chosen), light, np.repeat([3e4, 9e4], 2), ids)
    share = np.exp(1) / (np.exp(1) + np.exp(-1))  # temperature 1, in deviations of the sum, which are 1
    np.testing.assert_allclose(found.advantages, 2 * np.array([1 - share, share, share, 1 - share]), rtol=1e-5)


def test_a_run_trains_on_the_sum_and_logs_the_scores(folder, tmp_path):
    rows = {}
    for how in ("none", "advantages"):
        train(tiny.tiny_ready(folder, num_epochs=1, **TWO, **{"reward.normalise": how}), tmp_path / how)
        (rows[how],) = values(tmp_path / how)
    plain, asked = rows["none"], rows["advantages"]
    parts = [plain[f"reward/own_kinds:{part}"] for part in ("brightness", "redness")]
    assert plain["reward/mean"] == asked["reward/mean"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)
    # with 2 images of a prompt all z-scores are 1 or -1: the sums are 1.5 or 0.5 in size, the batch's deviation between
    assert 0.7 < asked["train/advantage_abs"] <= 1.0 + 1e-6
    assert asked["train/loss"] != plain["train/loss"]


def test_one_image_of_a_prompt_is_refused(folder):
    ready = tiny.tiny_ready(folder, **TWO, **{"reward.normalise": "advantages", "prompts.samples_per_prompt": 1})
    with pytest.raises(
        InputError, match=r"prompts.samples_per_prompt: received 1; reward.normalise=advantages .*use 4"
    ):
        build(ready)
