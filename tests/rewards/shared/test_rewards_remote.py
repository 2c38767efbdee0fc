"""The remote reward: a server's numbers, and what happens when it is not there, dies, comes back or lies."""

import threading
import time

import numpy as np
import pytest
from http_tools import served

from ddpo_jax.errors import InputError
from ddpo_jax.rewards import jpeg_compressibility, remote
from ddpo_jax.rewards._shared import http as _http
from ddpo_jax.rewards._shared.check import RewardError, call
from ddpo_jax.serving.server import Server, json_reply

RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
PROMPTS = [f"prompt {i}" for i in range(5)]
METADATA = [{"count": np.int64(i)} for i in range(5)]


def made(url, **options):
    config = remote.default_config()
    config.url = url
    with config.unlocked():
        config.update(options)
    return remote.make(config)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(_http, "MAX_WAIT_S", 0.05)


def compressibility(images, prompts, metadata):
    return call(jpeg_compressibility.make(jpeg_compressibility.default_config()), images, prompts, metadata, "jpeg")


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_the_scores_are_those_of_the_reward_that_is_served(batch_size):
    sizes = []

    def score(images, prompts, metadata):
        sizes.append(len(images))
        assert prompts == [f"prompt {entry['count']}" for entry in metadata]
        return compressibility(images, prompts, metadata)

    expected, expected_parts = compressibility(IMAGES, PROMPTS, METADATA)
    with served(score) as server:
        scores, parts = call(made(server.url, batch_size=batch_size), IMAGES, PROMPTS, METADATA, "remote")
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(parts["jpeg_kb"], expected_parts["jpeg_kb"])
    assert sizes == [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]


def test_a_part_that_one_request_lacks_is_nan_there():
    def score(images, prompts, metadata):
        parts = {"odd": np.ones(len(images), np.float32)} if "1" in prompts[0] else {}
        return np.zeros(len(images), np.float32), parts

    with served(score) as server:
        _, parts = made(server.url, batch_size=1)(IMAGES, PROMPTS, METADATA)
    np.testing.assert_array_equal(parts["odd"], np.float32([np.nan, 1, np.nan, np.nan, np.nan]))


def test_the_token_is_the_options_or_the_environments(monkeypatch):
    with served(compressibility, token="secret") as server:
        with pytest.raises(InputError, match="reward.url: .*answered 401: the token is missing or wrong"):
            made(server.url)
        made(server.url, token="secret")
        monkeypatch.setenv("DDPO_TOKEN", "secret")
        made(server.url)
        with pytest.raises(InputError, match="answered 401"):
            made(server.url, token="other")


class Lying:
    """A server whose answers to ``/compute`` are given."""

    def __init__(self, *answers):
        self.answers, self.count = answers, 0
        routes = {"GET /health": lambda request: json_reply({}), "POST /compute": self._answer}
        self.server = Server(routes, host="127.0.0.1", port=0)

    def _answer(self, request):
        self.count += 1
        answer = self.answers[min(self.count, len(self.answers)) - 1]
        return answer if not isinstance(answer, list | dict) else json_reply(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.close()


def raw(text, kind="application/json"):
    """A reply that may say what JSON cannot."""
    from ddpo_jax.serving.server import Reply

    return Reply(text.encode(), kind)


ANSWERS = [
    (raw('{"rewards": [1, 2, NaN, 4, 5]}'), r"returned nan for image 2 \(prompt 'prompt 2'\); 1 of 5 scores are not"),
    (raw('{"rewards": [1, 2, Infinity, 4, -Infinity]}'), "returned inf for image 2"),
    (raw('{"rewards": [1, 2, 3, 4, 1e300]}'), "returned inf for image 4"),
    ({"rewards": [1, 2, 3, 4]}, r"returned shape \(4,\); it must return shape \(5,\)"),
    ({"rewards": [[1, 2, 3, 4, 5]]}, r"returned shape \(1, 5\)"),
    ({"rewards": 3.5}, "rewards that are a number; they must be a list"),
    ({"rewards": ["1", "2", "3", "4", "5"]}, "returned dtype <U1; it must return real numbers"),
    ({"rewards": [1, 2, 3, 4, None]}, "returned dtype object"),
    ({"rewards": [1, 2, 3, 4, [5]]}, "returned a list that is not an array of numbers"),
    ({"rewards": [True] * 5}, "returned dtype bool"),
    ({"rewards": [1] * 5, "parts": {"a": [1] * 4}}, r"part 'a', returned shape \(4,\)"),
    ({"scores": [1] * 5}, "answered an object with 'scores'; it must be an object with 'rewards'"),
    ([1.0] * 5, "answered a list"),
    (raw("<html>\n<h1>It works!</h1>", "text/html"), "answered text/html instead of application/json: <html> <h1>It"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS)
def test_an_answer_that_is_no_scores_is_one_line_after_patience_is_over(answer, message):
    with Lying(answer) as lying:
        fn = made(lying.server.url, patience_s=0.0)
        with pytest.raises(RewardError, match=message) as caught:
            call(fn, IMAGES, PROMPTS, METADATA, "remote")
    text = str(caught.value)
    assert text.startswith(f"reward 'remote': {lying.server.url} answered ") and "\n" not in text
    assert text.endswith("; tried once in 0 s")


def test_a_lie_that_is_mended_in_time_loses_nothing():
    with Lying(ANSWERS[0][0], ANSWERS[3][0], ANSWERS[-1][0], {"rewards": [5, 4, 3, 2, 1]}) as lying:
        scores, _ = call(made(lying.server.url), IMAGES, PROMPTS, METADATA, "remote")
        np.testing.assert_array_equal(scores, [5, 4, 3, 2, 1])
        assert lying.count == 4


def test_what_a_server_refuses_is_told_at_once():
    with served(compressibility, max_bytes=300) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"answered 413: the body has \d+ bytes; at most 300 are taken"):
            made(server.url)(IMAGES, PROMPTS, METADATA)
        assert time.monotonic() - start < 30  # not ten minutes of patience
        with pytest.raises(RewardError, match="metadata holds a object, which JSON has no word for"):
            made(server.url)(IMAGES[:1], PROMPTS[:1], [{"x": object()}])


def test_a_dead_server_is_waited_for_and_only_the_request_is_repeated():
    """It dies while the second request is computed, and comes back on its port: the first request is not repeated."""
    seen, died = [], threading.Event()

    def score(images, prompts, metadata):
        seen.append(prompts[0])
        if prompts[0] == "prompt 2" and not died.is_set():
            died.set()
            raise RuntimeError("out of memory")
        return compressibility(images, prompts, metadata)

    with served(score) as first:
        fn = made(first.url, batch_size=2)
        results = []
        asking = threading.Thread(target=lambda: results.append(fn(IMAGES, PROMPTS, METADATA)))
        asking.start()
        assert died.wait(20)
    time.sleep(0.2)  # nobody listens: refused connections
    assert asking.is_alive()
    with served(score, port=first.port):
        asking.join(20)
    np.testing.assert_array_equal(results[0][0], compressibility(IMAGES, PROMPTS, METADATA)[0])
    assert seen == ["prompt 0", "prompt 2", "prompt 2", "prompt 4"]


def test_patience_ends():
    with served(compressibility) as server:
        fn = made(server.url, patience_s=0.3)
    with pytest.raises(RewardError, match=r"cannot be reached: Connection refused; tried \d+ times in 0 s"):
        fn(IMAGES, PROMPTS, METADATA)


def test_closing_ends_the_wait():
    with served(compressibility) as server:
        fn = made(server.url)
    threading.Timer(0.2, fn.close).start()
    with pytest.raises(RewardError, match="no longer waited for"):
        fn(IMAGES, PROMPTS, METADATA)


def test_without_a_server_a_run_does_not_start():
    with served(compressibility) as server:
        url = server.url
    with pytest.raises(InputError) as caught:
        made(url)
    assert str(caught.value) == (
        f"reward.url: received '{url}'; {url} cannot be reached: Connection refused; "
        "start a server there, such as: ddpo_jax serve --reward=aesthetic --port=8000"
    )
    html = Server({"GET /health": lambda request: raw("<p>Hello</p>", "text/html")}, host="127.0.0.1", port=0)
    with pytest.raises(InputError, match="answered text/html instead of application/json: <p>Hello</p>; start a"):
        made(html.url)
    html.close()


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 0), ("timeout_s", 0.0), ("patience_s", -1.0), ("timeout_s", float("nan"))]
)
def test_options_that_make_no_sense(option, value):
    with pytest.raises(InputError, match=rf"reward.{option}: received {value}; it must be at least"):
        made("http://127.0.0.1:1", **{option: value})
