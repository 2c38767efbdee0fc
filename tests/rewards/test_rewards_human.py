"""The reward that waits for people: what it returns, what it refuses, how it ends."""

import threading
import time

import http_tools
import numpy as np
import pytest
from http_tools import ask, rated

from ddpo_jax.errors import InputError
from ddpo_jax.feedback.answers import image_name, read
from ddpo_jax.rewards import human
from ddpo_jax.rewards._shared.check import RewardError, call
from ddpo_jax.rollout.scoring import RewardRunner

IMAGES = np.random.default_rng(6).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
IMAGES[3:] //= np.arange(2, 5, dtype=np.uint8)[:, None, None, None]  # of three the contrast differs
PROMPTS = ["a", "a", "b", "b", "b", "b"]
METADATA = [{}] * 6


@pytest.fixture
def made(tmp_path):
    rewards = []

    def make(**options):
        config = human.default_config()
        config.update({"folder": str(tmp_path / "answers"), "port": 0} | options)
        rewards.append(human.make(config))
        return rewards[-1]

    yield make
    for reward in rewards:
        reward.close()


def brighter(task, images):
    """The better image of a pair is the brighter one."""
    return task["images"][int(images[0].mean() < images[1].mean())]


def test_stars(made, tmp_path):
    reward = made()
    with rated(reward.address, http_tools.stars, count=2):
        scores, parts = call(reward, IMAGES, PROMPTS, METADATA, "human")
    expected = [http_tools.stars(None, [image]) for image in IMAGES]
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(scores, expected)
    assert parts == {}
    kept = read(tmp_path / "answers").scores()
    assert kept == {(image_name(i), p): float(s) for i, p, s in zip(IMAGES, PROMPTS, expected, strict=True)}
    reward.close()
    again = made()  # nobody rates, and nobody needs to
    np.testing.assert_array_equal(again(IMAGES[::-1], PROMPTS[::-1], METADATA)[0], expected[::-1])


@pytest.mark.parametrize("opponents", [0, 3])
def test_pairs(made, tmp_path, opponents):
    """Of n images the brightest wins n - 1 comparisons, the next n - 2, ...; a prompt's scores have a mean of 1/2."""
    reward = made(mode="pairs", opponents=opponents)
    with rated(reward.address, brighter):
        scores, _ = call(reward, IMAGES, PROMPTS, METADATA, "human")
    for group in (slice(0, 2), slice(2, 6)):
        brightness = [image.mean() for image in IMAGES[group]]
        rank = np.argsort(np.argsort(brightness))
        np.testing.assert_allclose(scores[group], rank / (len(rank) - 1), rtol=1e-6)
    assert len(read(tmp_path / "answers").pairs()) == 1 + 6


def test_closing_a_runner_ends_the_wait_and_frees_the_port(made):
    reward = made()
    port = int(reward.address.rpartition(":")[2])
    with RewardRunner(reward, name="human") as runner:
        pending = runner.submit(IMAGES, PROMPTS, METADATA)
        while not ask(f"{reward.address}/next?page=x")[2]["total"]:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    with pytest.raises(RewardError, match="reward 'human': stopped with 0 of 6 answers given, which are kept"):
        pending.result()
    made(port=port).close()


def test_an_image_without_another_to_compare_with_is_one_line(made):
    with pytest.raises(RewardError, match="prompts.samples_per_prompt must be at least 2") as caught:
        call(made(mode="pairs"), IMAGES[:1], ["a"], [{}], "human")
    assert "\n" not in str(caught.value)


def test_the_address_carries_the_token(made):
    reward = made(token="secret", host="0.0.0.0")
    base, _, token = reward.address.partition("/#token=")
    assert token == "secret"
    assert ask(f"http://127.0.0.1:{base.rpartition(':')[2]}/next?page=x")[0] == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "likes"}, "reward.mode: received 'likes'; it must be score or pairs"),
        ({"opponents": -1}, "reward.opponents: received -1"),
        ({"lease_s": 0.0}, "reward.lease_s: received 0.0"),
        ({"lease_s": float("nan")}, "reward.lease_s: received nan"),
        ({"port": 65536}, "reward.port: received 65536"),
        ({"host": "0.0.0.0"}, "reward.host: received '0.0.0.0' without a token"),
        ({"folder": "~nobody-of-this-name/x"}, "reward.folder: received '~nobody-of-this-name/x'; cannot write there"),
        ({"folder": "/dev/null/x"}, "reward.folder: received '/dev/null/x'; cannot write there: Not a directory"),
    ],
)
def test_options_that_cannot_be(made, options, message):
    with pytest.raises(InputError, match=message) as caught:
        made(**options)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_one_line(made):
    port = int(made().address.rpartition(":")[2])
    with pytest.raises(InputError, match=rf"reward.port: received {port}; another program .* reward.port={port + 1}"):
        made(port=port)


def test_lease_and_batches_one_after_the_other(made):
    """A page that never answers holds its image for ``lease_s`` only; the next call is shown when the first is done."""
    reward = made(lease_s=1.0)
    results = []
    waiting = threading.Thread(target=lambda: results.append(reward(IMAGES[:1], ["a"], [{}])[0]), daemon=True)
    waiting.start()
    while not ask(f"{reward.address}/next?page=asleep")[2]["task"]:
        time.sleep(0.01)
    with rated(reward.address, lambda task, images: 2):
        waiting.join(30)
        np.testing.assert_array_equal(results, [[2]])
        np.testing.assert_array_equal(reward(IMAGES[1:3], ["a", "b"], [{}, {}])[0], [2, 2])
