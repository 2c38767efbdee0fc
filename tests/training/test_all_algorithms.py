"""Every algorithm through ``train()``: two epochs on the smallest model, weighted and replayed where it may be.

The files are discovered, so a new algorithm is tested without an edit here.
"""

import re

import numpy as np
import pytest
from tiny import SMALLEST_UNET, quick_compilation, tiny_pipeline_folder, tiny_ready

from ddpo_jax import find
from ddpo_jax.config.validate import doubts
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import checkpoint, metrics

NAMES = find.available("algorithms")
SMALL = {"train.lora_rank": 2, "sample.num_steps": 3, "replay.k": 1, "log.images_every": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with quick_compilation():
        yield tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=SMALLEST_UNET)


def traits(name):
    module = find.find("algorithms", name)
    return module.traits(module.default_config())


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_weighted_and_replayed(name, folder, tmp_path):
    replayed = not traits(name).on_policy
    chosen = {"algorithm.name": name, "weighting.name": "latent_change_squared"}
    chosen |= {"replay.name": "hard"} if replayed else {}
    train(tiny_ready(folder, **SMALL, **chosen), tmp_path)
    rows = metrics.read_metrics(tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1] and [row["reward_queries"] for row in rows] == [8, 16]
    assert all(np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in rows)
    assert rows[0]["replay/samples"] == 0
    if not traits(name).branching:  # which may keep too few to replay
        assert rows[1]["replay/samples"] == (8 if replayed else 0)
    assert all(("train/value_loss" in row) == (traits(name).value_updates > 0) for row in rows)
    if "train/ratio_first_update_deviation" in rows[0]:  # the sampler and the learner agree on the log-probabilities
        assert rows[0]["train/ratio_first_update_deviation"] < 1e-4
    with checkpoint.Checkpointer(tmp_path, read_only=True) as saver:
        before, after = (saver.read(epoch, "state/params") for epoch in (1, 2))
    # AdamW's steps are of the learning rate's size, 3e-4; weight decay alone would move 1e-8
    assert max(np.abs(after[key] - before[key]).max() for key in before) > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_go_together_is_refused_with_the_reason(name, folder):
    used = traits(name)

    def refusal(**changes):
        try:
            tiny_ready(folder, **{**SMALL, "algorithm.name": name, **changes})
        except ValueError as error:
            return str(error)
        return ""

    assert refusal() == ""
    for changes in ({"replay.name": "hard"}, {"replay.name": "random"}):
        reason = f"replay.name: received .*algorithm '{name}' has no importance ratio.*use replay.name="
        assert_refused_if(used.on_policy, refusal(**changes), reason)
    couples = f"the loss of algorithm '{name}' couples all steps"
    assert_refused_if(not used.separable, refusal(**{"train.timestep_fraction": 0.5}), couples)
    single = refusal(**{"prompts.samples_per_prompt": 1})
    assert_refused_if(used.group, single, f"prompts.samples_per_prompt: received 1; algorithm '{name}' compares")


@pytest.mark.parametrize("name", NAMES)
def test_several_updates_without_an_importance_ratio_are_doubted(name, folder):
    """Gao et al. 2025, Table 1, make four with the score function: possible, with a warning."""
    used = traits(name)

    def doubted(**changes):
        config = tiny_ready(folder, **{**SMALL, "algorithm.name": name, **changes}).config
        return list(doubts(config, used))

    assert doubted() == []
    why = f"algorithm '{name}' has no importance ratio"
    cases = {
        "train.num_inner_epochs: received 2;": {"train.num_inner_epochs": 2},
        "train.batch_size: received 8;": {"sample.num_batches_per_epoch": 2, "train.batch_size": 8},
    }
    for start, changes in cases.items():
        found = doubted(**changes)
        assert len(found) == used.on_policy
        assert all(line.startswith(start) and why in line for line in found)


def assert_refused_if(refused, message, reason):
    if refused:
        assert re.search(reason, message), message
    else:
        assert message == ""
