"""The reward runner: what it hands on, what it refuses and how it says so."""

import contextlib
import sys
import threading
import time

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ddpo_jax.find import find
from ddpo_jax.rollout import scoring as reward_runner
from ddpo_jax.rollout.scoring import RewardError, RewardRunner

PROMPTS = ["a cat", "a dog", "a fox"]
IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
METADATA = [{}, {"index": 1}, {}]


def run(fn, name="test"):
    with RewardRunner(fn, name=name) as runner:
        return runner.submit(IMAGES, PROMPTS, METADATA).result()


@pytest.mark.parametrize("kind", [list, np.float64, np.int32, np.float16, "jax", "bfloat16"])
def test_scores_come_back_as_float32(kind):
    values = [1, 2, -3]
    if kind == "jax":
        output = jnp.asarray(values, jnp.float32)
    elif kind == "bfloat16":
        output = jnp.asarray(values, jnp.bfloat16)
    else:
        output = values if kind is list else np.asarray(values, kind)
    scores, parts = run(lambda *_: output)
    assert scores.dtype == np.float32 and parts == {}
    np.testing.assert_array_equal(scores, [1, 2, -3])


@pytest.mark.parametrize(
    "output",
    [
        (1.0, 2.0, -3.0),
        (np.float32(1), 2, np.int64(-3)),
        [jnp.asarray(1.0), jnp.bfloat16(2), np.asarray(-3)],
    ],
)
def test_a_tuple_of_numbers_is_a_list_of_numbers(output):
    np.testing.assert_array_equal(run(lambda *_: output)[0], [1, 2, -3])


def test_two_numbers_are_scores_and_not_parts():
    with RewardRunner(lambda *_: (1.0, 2.0)) as runner:
        scores, parts = runner.submit(IMAGES[:2], PROMPTS[:2], METADATA[:2]).result()
    assert scores.tolist() == [1.0, 2.0] and parts == {}


@pytest.mark.parametrize("kind", ["requires grad", "bfloat16", "float16", "int64", "list of scalars", "parts"])
def test_tensors_of_torch(kind):
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.0, 2.0, -3.0])
    output = {
        "requires grad": values.clone().requires_grad_() * 1.0,
        "bfloat16": values.bfloat16().requires_grad_(),
        "float16": values.half(),
        "int64": values.long(),
        "list of scalars": [value.bfloat16().requires_grad_() for value in values],
        "parts": (values.requires_grad_(), {"part": values.bfloat16()}),
    }[kind]
    scores, parts = run(lambda *_: output)
    np.testing.assert_array_equal(scores, [1, 2, -3])
    assert all(part.tolist() == [1, 2, -3] for part in parts.values()) and len(parts) == (kind == "parts")


def test_the_reward_sees_its_batch_and_nan_parts_pass():
    seen = {}

    def fn(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return np.ones(3), {"relation": np.array([np.nan, 0.5, np.nan])}

    scores, parts = run(fn)
    np.testing.assert_array_equal(seen["images"], IMAGES)
    assert seen["prompts"] == PROMPTS and seen["metadata"] == METADATA
    np.testing.assert_array_equal(scores, 1)
    assert parts["relation"].dtype == np.float32
    np.testing.assert_array_equal(parts["relation"], np.float32([np.nan, 0.5, np.nan]))


def broken(images, prompts, metadata):
    raise KeyError("no such\nsubject")


def mutates(images, prompts, metadata):
    images[0] = 1
    return np.ones(3)


def mutates_prompts(images, prompts, metadata):
    prompts[1] = "changed"
    return [0.0, np.nan, np.inf]


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Bare(BaseException):
    pass


class Awkward:
    """Whatever is asked of it fails."""

    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __array__ = __len__ = __str__


def raising(error):
    def fn(images, prompts, metadata):
        raise error

    return fn


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (broken, r"'test' raised KeyError: 'no such\\nsubject'"),
        (mutates, r"ValueError: assignment destination is read-only"),
        (mutates_prompts, r"returned nan for image 1 \(prompt 'a dog'\); 2 of 3 scores are not finite; .* finite"),
        (lambda *_: [0.0, 0.0, -np.inf], r"returned -inf for image 2 \(prompt 'a fox'\); 1 of 3"),
        (lambda *_: [1e300, 0.0, 0.0], r"returned inf for image 0"),
        (lambda *_: np.ones(2), r"returned shape \(2,\); it must return shape \(3,\)"),
        (lambda *_: np.ones((3, 1)), r"returned shape \(3, 1\)"),
        (lambda *_: 1.0, r"returned shape \(\)"),
        (lambda *_: None, r"returned None; it must return 3 scores"),
        (lambda *_: ["a", "b", "c"], r"dtype <U1; it must return real numbers"),
        (lambda *_: np.ones(3, complex), r"dtype complex128; it must return real numbers"),
        (lambda *_: np.ones(3, bool), r"dtype bool"),
        (lambda *_: [[1.0], [1.0, 2.0], 3.0], r"list that is not an array of numbers"),
        (lambda *_: (np.ones(3), np.ones(3)), r"tuple of \(ndarray, ndarray\); .* \(N scores, dict of parts\)"),
        (lambda *_: (np.ones(3), {"color": np.ones(4)}), r"part 'color', returned shape \(4,\)"),
        (lambda *_: (np.ones(3), None), r"tuple of \(ndarray, NoneType\)"),
        (lambda *_: (np.ones(3), {"mean": np.ones(3)}), r"a part named 'mean', as which a statistic .* is logged"),
        (lambda *_: (np.ones(3), {7: np.ones(3)}), r"a part whose name is a int; names of parts must be printable"),
        (lambda *_: (np.ones(3), {Awkward(): np.ones(3)}), r"a part whose name is a Awkward"),
        (lambda *_: (np.ones(3), {"\udcff": np.ones(3)}), r"a part named '\\udcff'"),
        (lambda *_: (1.0, 2.0), r"returned shape \(2,\)"),
        (lambda *_: Awkward(), r"returned a Awkward that is not an array of numbers: RuntimeError: no words"),
        (lambda *_: [Awkward()] * 3, r"'test' returned "),
        (raising(Unspeakable()), r"'test' raised Unspeakable: \(its message cannot be shown\)"),
        (raising(Bare("bare")), r"'test' raised Bare: bare"),
        (raising(SystemExit(3)), r"'test' raised SystemExit: 3"),
        (raising(GeneratorExit()), r"'test' raised GeneratorExit"),
    ],
)
def test_unusable_rewards_are_one_clear_line(fn, message):
    with pytest.raises(RewardError, match=message) as caught:
        run(fn)
    assert "\n" not in str(caught.value)


def test_the_error_keeps_its_cause_and_the_runner_goes_on():
    with RewardRunner(lambda images, prompts, metadata: 1 / (len(prompts) - 3) * np.ones(len(prompts))) as runner:
        bad = runner.submit(IMAGES, PROMPTS, METADATA)
        good = runner.submit(IMAGES[:2], PROMPTS[:2], METADATA[:2])
        with pytest.raises(RewardError) as caught:
            bad.result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        np.testing.assert_array_equal(good.result()[0], [-1, -1])


def test_a_score_that_is_wrong_for_a_prompt_that_is_no_text():
    prompts = ["a cat", "half \udcff", "a fox"]
    with RewardRunner(lambda *_: [0.0, np.nan, 0.0]) as runner, pytest.raises(RewardError, match="image 1") as caught:
        runner.submit(IMAGES, prompts, METADATA).result()
    str(caught.value).encode()


def test_it_runs_in_the_background_batch_after_batch():
    gate, running = threading.Event(), []

    def fn(images, prompts, metadata):
        running.append(metadata[0]["batch"])
        gate.wait(10)
        return np.full(len(prompts), metadata[0]["batch"])

    with RewardRunner(fn, name="slow") as runner:
        pending = [runner.submit(IMAGES, PROMPTS, [{"batch": i}] * 3) for i in range(2)]
        while not running:
            time.sleep(0.01)
        assert running == [0] and "reward 'slow', call 1 (3 images, the first of ['a cat'])" in runner.waits_for()
        gate.set()
        for i, one in enumerate(pending):  # in the order of submission
            np.testing.assert_array_equal(one.result()[0], i)
        while runner.waits_for():
            time.sleep(0.01)


def test_a_reward_that_hangs_is_given_up_after_its_time_and_does_not_keep_the_runner():
    """The second batch waits for the first, which hangs: both say so, and leaving takes no time."""
    gate = threading.Event()

    def fn(images, prompts, metadata):
        gate.wait(60)
        return np.ones(len(prompts))

    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(gate.set)
        runner = stack.enter_context(RewardRunner(fn, name="stuck", wait_s=0.3))
        first, second = (runner.submit(IMAGES, PROMPTS, METADATA) for _ in range(2))
        for pending in (second, first):
            with pytest.raises(
                RewardError, match=r"'stuck' has not returned from call 1 .*'a cat'.* after 0.3 s"
            ) as got:
                pending.result()
            assert "reward.wait_s" in str(got.value) and "\n" not in str(got.value)
        runner.close()
        with pytest.raises(RewardError, match="dropped"):
            second.result()
        assert 0.3 <= time.monotonic() - start < 5


def test_the_time_counts_for_each_batch():
    def fn(images, prompts, metadata):
        time.sleep(0.2)
        return np.ones(len(prompts))

    with RewardRunner(fn, wait_s=0.5) as runner:
        pending = [runner.submit(IMAGES, PROMPTS, METADATA) for _ in range(4)]
        for one in pending:
            one.result()


def test_a_reward_that_can_be_closed_is():
    class Patient:
        def __init__(self):
            self.closed = threading.Event()

        def __call__(self, images, prompts, metadata):
            self.closed.wait(10)
            raise RewardError("reward 'patient' was closed")

        def close(self):
            self.closed.set()

    fn = Patient()
    runner = RewardRunner(fn)
    pending = runner.submit(IMAGES, PROMPTS, METADATA)
    runner.close()
    assert fn.closed.is_set()
    with pytest.raises(RewardError):
        pending.result()


def test_mismatched_batches_are_refused():
    with RewardRunner(lambda *_: np.ones(3)) as runner, pytest.raises(ValueError, match=r"3 images, 2 prompts"):
        runner.submit(IMAGES, PROMPTS[:2], METADATA)


def made(name):
    return reward_runner.make_reward(ml_collections.ConfigDict({"name": name}), find("rewards", name))


def test_a_reward_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_xyz").mkdir()
    (tmp_path / "own_xyz" / "rewards.py").write_text(
        "def length(images, prompts, metadata):\n"
        "    return [len(p) for p in prompts], {'n': [m.get('index', 0) for m in metadata]}\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    fn = made("own_xyz.rewards:length")
    scores, parts = run(fn)
    np.testing.assert_array_equal(scores, [5, 5, 5])
    np.testing.assert_array_equal(parts["n"], [0, 1, 0])
    with pytest.raises(ValueError, match=r"own_xyz\.rewards.*no function make\(config\).*own_xyz\.rewards:function"):
        made("own_xyz.rewards")
    with pytest.raises(ValueError, match=r"jpeg_compressibility"):
        made("jpeg_compresibility")


def test_a_reward_of_the_package():
    fn = made("jpeg_incompressibility")
    scores, parts = run(fn, "jpeg_incompressibility")
    np.testing.assert_array_equal(scores, parts["jpeg_kb"])
