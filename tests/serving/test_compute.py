"""A reward behind HTTP: the same numbers, one batch at a time, a bounded queue, faults in one line."""

import json
import socket
import threading
import time

import http_tools
import numpy as np
import pytest
from http_tools import ask, png, served
from waiting import until

from ddpo_jax.errors import InputError

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
BODY = {"prompt": ["a", "b", "c"], "image": [png(image) for image in IMAGES], "metadata": [{}, {"n": 2}, {}]}


def brightness(images, prompts, metadata):
    scores = images.mean((1, 2, 3), dtype=np.float32)
    return scores, {"n": np.float32([entry.get("n", np.nan) for entry in metadata])}


def test_scores_and_parts_are_those_of_the_reward():
    with served(brightness, name="brightness") as server:
        health = {"status": "ok", "reward": "brightness", "requests": 0, "images_computed": 0}
        assert ask(f"{server.url}/health")[::2] == (200, health)
        status, _, reply = ask(f"{server.url}/compute", "POST", BODY)
        assert status == 200
        np.testing.assert_array_equal(np.float32(reply["rewards"]), [image.mean(dtype=np.float32) for image in IMAGES])
        assert reply["parts"] == {"n": [None, 2.0, None]}
        assert ask(f"{server.url}/health")[2]["images_computed"] == 3


@pytest.mark.parametrize(
    "body, message", [({"prompt": ["a"]}, "no 'image'"), (BODY | {"prompt": ["a"]}, "received 1 prompts, 3 images")]
)
def test_a_bad_request_is_400_and_does_not_reach_the_reward(body, message):
    def never(images, prompts, metadata):
        raise RuntimeError("called")

    with served(never) as server:
        status, _, reply = ask(f"{server.url}/compute", "POST", body)
        assert status == 400 and message in reply["error"]


def test_a_request_that_is_too_large_is_413_with_room_for_more():
    with served(brightness, max_bytes=500) as server:
        status, _, reply = ask(f"{server.url}/compute", "POST", BODY)
        assert status == 413 and "at most 500" in reply["error"]


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_the_reward_raises_is_500_in_one_line(error):
    def broken(images, prompts, metadata):
        if prompts[0] == "a":
            raise error
        return brightness(images, prompts, metadata)

    with served(broken) as server:
        status, _, reply = ask(f"{server.url}/compute", "POST", BODY)
        assert status == 500 and "\n" not in reply["error"]
        assert reply["error"] == {ValueError: "two lines", SystemExit: "3"}.get(type(error), "KeyboardInterrupt")
        assert ask(f"{server.url}/compute", "POST", BODY | {"prompt": ["x", "y", "z"]})[0] == 200


def test_what_is_wrong_with_a_prompt_is_422_which_nobody_asks_again():
    def particular(images, prompts, metadata):
        raise InputError("it counts nothing; name a number")

    with served(particular) as server:
        status, _, reply = ask(f"{server.url}/compute", "POST", BODY)
        assert status == 422 and "it counts nothing" in reply["error"]


class Gate:
    """A reward that waits until it may go on, and counts how many calls are in it at once."""

    def __init__(self):
        self.go, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        self.go.wait(20)
        self.inside -= 1
        return brightness(images, prompts, metadata)


def test_one_at_a_time_and_a_full_queue_sends_away():
    gate = Gate()
    with served(gate, queue=2) as server:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(ask(f"{server.url}/compute", "POST", BODY)))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(results) >= 2, 20)  # one runs, two wait, two are sent away
        assert ask(f"{server.url}/health")[2]["requests"] == 3  # it answers meanwhile
        assert [(status, headers["Retry-After"]) for status, headers, _ in results] == [(503, "1")] * 2
        gate.go.set()
        for thread in threads:
            thread.join(20)
        assert sorted(status for status, _, _ in results) == [200, 200, 200, 503, 503]
        assert gate.most == 1 and gate.calls == 3


def test_a_request_whose_client_has_gone_is_not_computed():
    gate = Gate()
    with served(gate) as server:
        first = threading.Thread(target=http_tools.ask, args=(f"{server.url}/compute", "POST", BODY))
        first.start()
        assert gate.entered.wait(20)
        body = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as impatient:
            head = f"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            impatient.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: ask(f"{server.url}/health")[2]["requests"] >= 2, 20)
        time.sleep(0.3)  # for the server to notice
        gate.go.set()
        first.join(20)
        assert ask(f"{server.url}/compute", "POST", BODY)[0] == 200
        assert gate.calls == 2
