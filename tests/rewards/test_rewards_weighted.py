"""Weighted sums: the arithmetic, the log of every part, and every way to write one wrong."""

import threading

import numpy as np
import pytest
import tiny_models

from ddpo_jax.rewards import jpeg_compressibility, weighted
from ddpo_jax.rollout import scoring as reward_runner

OWN = """
import threading
import numpy as np
from ml_collections import ConfigDict

def length(images, prompts, metadata):
    return [len(p) for p in prompts]

def nothing(images, prompts, metadata):
    return [np.nan] * len(prompts)

def short(images, prompts, metadata):
    return [1.0]

class Patient:
    waits_for_others = True

    def __init__(self):
        self.done, self.closed = threading.Event(), False

    def __call__(self, images, prompts, metadata):
        return [2.0] * len(prompts) if self.done.wait(30) else None

    def close(self):
        self.closed = True

patient = Patient()

AUTO = {"weights": ("mini", "big")}

def default_config():
    return ConfigDict({"weights": "auto", "offset": 0.5, "count": 1, "flag": False})

def make(config):
    base = {"mini": 1000.0, "big": 2000.0}[config.weights]
    value = base + config.offset + 10 * config.count + 100 * config.flag
    return lambda images, prompts, metadata: (np.full(len(prompts), value), {"index": [m["index"] for m in metadata]})
"""
PROMPTS = ["ab", "abcd", "a"]
METADATA = [{"index": i} for i in range(3)]


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_weighted").mkdir()
    (tmp_path / "own_weighted" / "rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def make(rewards, options="", weights="mini", normalise="none"):
    config = weighted.default_config()
    config.update({"rewards": rewards, "options": options, "weights": weights, "normalise": normalise})
    return weighted.make(config)


def test_sum_and_parts(images):
    fn = make("jpeg_compressibility=-2, own_weighted.rewards:length=0.5, own_weighted.rewards=1e-3")
    scores, parts = fn(images[:3], PROMPTS, METADATA)
    kilobytes = -jpeg_compressibility.make(jpeg_compressibility.default_config())(images[:3], PROMPTS, METADATA)[0]
    np.testing.assert_allclose(scores, 2 * kilobytes + [1, 2, 0.5] + np.float32(1.0105), rtol=1e-6)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(parts["own_weighted.rewards:length"], [2, 4, 1])
    np.testing.assert_array_equal(parts["own_weighted.rewards/index"], [0, 1, 2])
    np.testing.assert_array_equal(parts["jpeg_compressibility/jpeg_kb"], kilobytes)
    assert all(part.dtype == np.float32 for part in parts.values())


def test_what_is_to_be_standardised_is_said_and_the_score_stays_the_sum(images):
    rewards = "jpeg_compressibility=-2,own_weighted.rewards:length=0.5"
    plain, asked = make(rewards), make(rewards, normalise="advantages")
    assert plain.decoupled == {}
    assert asked.decoupled == {"jpeg_compressibility": -2, "own_weighted.rewards:length": 0.5}
    scores, parts = asked(images[:3], PROMPTS, METADATA)
    np.testing.assert_array_equal(scores, plain(images[:3], PROMPTS, METADATA)[0])
    assert asked.decoupled.keys() <= parts.keys()
    with pytest.raises(ValueError, match=r"reward.normalise: received 'scores'; it must be none or advantages"):
        make(rewards, normalise="scores")


def test_options_reach_their_member_and_auto_follows_the_model(images):
    name = "own_weighted.rewards"

    def value(options="", weights="mini"):
        return make(f"{name}=1", options, weights)(images[:3], PROMPTS, METADATA)[0][0]

    assert value() == 1010.5
    assert value(weights="full") == 2010.5
    assert value(f"{name}.weights=big, {name}.offset=-1,{name}.count=2,{name}.flag=true") == 2119.0


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ("", "", r"reward.rewards: received ''; it must name a reward"),
        ("jpeg_compressibility", "", r"received 'jpeg_compressibility'; it must be name=value"),
        ("jpeg_compressibility=x", "", r"jpeg_compressibility=x; the weight must be a finite number"),
        ("jpeg_compressibility=inf", "", r"must be a finite number"),
        ("jpeg_compressibility=1,jpeg_compressibility=2", "", r"each reward may be named once: jpeg_compressibility"),
        ("weighted=1", "", r"a weighted sum cannot contain itself"),
        ("jpeg=1", "", r"member jpeg: .*there is no 'jpeg'"),
        ("jpeg_compressibility=1", "scale=3", r"received scale=3; it must be member.option=value"),
        ("jpeg_compressibility=1", "aesthetic.clip=x", r"one of the members jpeg_compressibility"),
        ("jpeg_compressibility=1", "jpeg_compressibility.quality=3", r"has no option 'quality'; its options are none"),
        ("own_weighted.rewards=1", "own_weighted.rewards.count=1.5", r"received '1.5'; it must be int"),
        ("own_weighted.rewards=1", "own_weighted.rewards.flag=maybe", r"received 'maybe'; it must be bool"),
        ("own_weighted.rewards:length=1", "own_weighted.rewards:length.x=1", r"a function has no options"),
        ("aesthetic=1", "aesthetic.weights=clip", r"member aesthetic: reward.weights='clip': must be mini or laion"),
    ],
)
def test_wrong_sums_are_one_clear_line(rewards, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(rewards, options)
    assert "\n" not in str(caught.value)


def test_closing_the_sum_closes_its_members():
    with tiny_models.Server(lambda payload: 503) as server:
        fn = make("jpeg_compressibility=1,ocr=1", f"ocr.recogniser={server.url}")
        threading.Timer(0.3, fn.close).start()
        with pytest.raises(reward_runner.RewardError, match=r"answered 503; no longer waited for"):
            fn(np.zeros((1, 8, 8, 3), np.uint8), ['a sign "A"'], [{}])


def test_weights_must_be_resolved():
    with pytest.raises(ValueError, match=r"reward.weights='auto': must be mini or full"):
        make("jpeg_compressibility=1", weights="auto")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("own_weighted.rewards:nothing", r"reward 'own_weighted.rewards:nothing' returned nan for image 0"),
        ("own_weighted.rewards:short", r"reward 'own_weighted.rewards:short' returned shape \(1,\)"),
    ],
)
def test_a_broken_member_is_named(member, message, images):
    fn = make(f"jpeg_compressibility=1,{member}=0")
    with (
        reward_runner.RewardRunner(fn, name="weighted") as runner,
        pytest.raises(reward_runner.RewardError, match=message),
    ):
        runner.submit(images[:3], PROMPTS, METADATA).result()


def test_a_member_that_waits_for_others_is_waited_for_and_let_go(images):
    """Longer than ``wait_s``, until it is done; and a run that ends tells it so."""
    fn = make("own_weighted.rewards:patient=1,own_weighted.rewards:length=10")
    from own_weighted import rewards as own

    with reward_runner.RewardRunner(fn, wait_s=0.05) as runner:
        pending = runner.submit(images[:3], PROMPTS, METADATA)
        threading.Timer(0.5, own.patient.done.set).start()
        np.testing.assert_array_equal(pending.result()[0], [22, 42, 12])
        assert not own.patient.closed
    assert own.patient.closed
    assert not make("own_weighted.rewards:length=1").waits_for_others
