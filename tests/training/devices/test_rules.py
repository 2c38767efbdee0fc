"""``mesh.rules`` in a run: every kind of parameters is split as they say, and what is computed stays the same."""

import jax
import numpy as np
import pytest
import tiny
import tiny_reward
from jax.sharding import PartitionSpec as P

from ddpo_jax.training.build import build
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics

KEYS = {"reward.name": "tiny_reward:reward", "mesh.data": 2, "mesh.fsdp": 2}
RULES = r"(to_[qk]\.kernel=1,to_v=none,conv.*kernel=3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


def specs(tree):
    """How each parameter of a tree is split, by name."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names:
            found.setdefault(names[-1], set()).add(x.sharding.spec)
    return found


def test_parameters_moments_average_reference_and_frozen_weights_follow(folder):
    kinds = {"algorithm.name": "ddpo_iskl", "train.ema_decay": 0.9, "mesh.rules": RULES}
    whole = build(tiny.tiny_ready(folder, **KEYS, **kinds))
    adapters = build(tiny.tiny_ready(folder, **KEYS, **kinds | {"train.lora_rank": 2}))
    state = whole.init()
    for tree in (state.params, state.ema, state.opt_state, whole.model.reference, adapters.model.frozen):
        found = specs(tree)
        assert found
        for name, split in found.items():
            expected = P()
            if name.endswith(("to_q.kernel", "to_k.kernel")):
                expected = P(None, "fsdp")
            elif "conv" in name and name.endswith("kernel"):
                expected = P(None, None, None, "fsdp")
            assert split == {expected}, name


def test_what_is_computed_does_not_depend_on_the_rules(folder, tmp_path):
    rows = {}
    for name, rules in {"default": "(.*=largest)", "ours": RULES}.items():
        tiny_reward.reset()
        train(tiny.tiny_ready(folder, num_epochs=1, **KEYS, **{"mesh.rules": rules}), tmp_path / name)
        (rows[name],) = metrics.read_metrics(tmp_path / name)
    assert rows["ours"]["reward/mean"] == rows["default"]["reward/mean"]
    for key in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(rows["ours"][key], rows["default"][key], rtol=1e-4)


def test_a_rule_that_finds_nothing_is_refused_before_anything_is_trained(folder, tmp_path):
    with pytest.raises(ValueError, match="mesh.rules: received 'to_qq=0', which finds no parameter's name"):
        train(tiny.tiny_ready(folder, **KEYS, **{"mesh.rules": "(to_qq=0)"}), tmp_path)
