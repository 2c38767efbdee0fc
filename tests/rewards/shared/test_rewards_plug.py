"""Models from outside: a function of the user's, and a server, which may be slow, wrong, or not there."""

import threading
import time

import numpy as np
import pytest
import tiny_models

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import http
from ddpo_jax.rewards._shared import plug as _plug
from ddpo_jax.rewards._shared.check import RewardError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)


def connect(source, timeout_s=5.0, patience_s=0.2):
    return _plug.connect(source, "reward.recogniser", "texts", timeout_s, patience_s)


def test_a_function_gets_the_images_and_the_fields():
    assert connect("tiny_models:read")(IMAGES) == tiny_models.read(IMAGES)
    assert connect("tiny_models:answer")(IMAGES, question="why?") == tiny_models.answer(IMAGES, "why?")


def test_a_server_sees_the_very_pixels():
    def reply(payload):
        return {"texts": tiny_models.answer(tiny_models.images_of(payload), payload["question"])}

    with tiny_models.Server(reply) as server:
        assert connect(server.url)(IMAGES, question="why?") == tiny_models.answer(IMAGES, "why?")
        (asked,) = server.asked
    assert set(asked) == {"image", "question"}
    np.testing.assert_array_equal(tiny_models.images_of(asked), IMAGES)


def test_a_server_that_is_busy_is_asked_again():
    replies = [503, 429, {"texts": ["x"]}, {"texts": ["x", "y", "z"]}]
    with tiny_models.Server(lambda payload: replies.pop(0)) as server:
        assert connect(server.url, patience_s=60.0)(IMAGES) == ["x", "y", "z"]
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    "reply, again, why",
    [
        (500, True, r"answered 500; tried "),
        (404, False, r"answered 404$"),
        (b"<html>hello</html>", True, r"answered text/html instead of application/json: <html>hello</html>; tried "),
        ({"text": []}, True, r"answered \{'text': \[\]\}; it must answer \{'texts': \[...\]\}; tried "),
        (["x", "y", "z"], True, r"answered \['x', 'y', 'z'\]; it must answer"),
        ({"texts": ["x"]}, True, r"gave 1 answers for 3 images; it must give a list of one each; tried "),
        ({"texts": "xyz"}, True, r"gave a str for 3 images"),
    ],
)
def test_a_server_that_is_wrong_is_one_line(reply, again, why):
    with tiny_models.Server(lambda payload: reply) as server:
        with pytest.raises(RewardError, match=why) as error:
            connect(server.url)(IMAGES)
        assert (len(server.asked) > 1) is again
    assert "\n" not in str(error.value) and str(error.value).startswith(f"reward.recogniser: {server.url} ")


def test_a_server_that_is_not_there():
    with tiny_models.Server(lambda payload: 200) as server:
        url = server.url
    with pytest.raises(RewardError, match=r"/look cannot be reached: Connection refused; tried "):
        connect(url)(IMAGES)


def test_a_call_that_waits_for_a_server_can_be_ended():
    with tiny_models.Server(lambda payload: 503) as server:
        ask = connect(server.url, patience_s=600.0)
        threading.Timer(0.3, ask.close).start()
        with pytest.raises(RewardError, match=r"answered 503; no longer waited for"):
            ask(IMAGES)


@pytest.mark.parametrize(
    "source, why",
    [
        ("", r"received ''; it must name a model; write package.module:function or http://"),
        ("easyocr", r"received 'easyocr'; it must name a model"),
        ("tiny_models:write", r"received 'tiny_models:write'; .*has no 'write'"),
        ("http://", r"received 'http://'; it must be the address of a server"),
        ("nowhere.at.all:read", r"received 'nowhere.at.all:read'; .*there is no module 'nowhere'"),
    ],
)
def test_models_that_are_not_there(source, why):
    with pytest.raises(InputError, match=f"^reward.recogniser: {why}") as error:
        connect(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "times, why",
    [
        ({"timeout_s": 0.0}, "timeout_s: received 0.0; it must be a finite number of at least 0.001"),
        ({"timeout_s": float("nan")}, "timeout_s: received nan"),
        ({"timeout_s": float("inf")}, "timeout_s: received inf"),
        ({"patience_s": -1.0}, "patience_s: received -1.0; it must be a finite number of at least 0"),
    ],
)
def test_times_are_times(times, why):
    with pytest.raises(InputError, match=f"^reward.{why}"):
        connect("tiny_models:read", **times)


def test_a_server_that_is_slow_is_given_up():
    with tiny_models.Server(lambda payload: time.sleep(0.5) or {"texts": ["x", "y", "z"]}) as server:
        assert connect(server.url)(IMAGES) == ["x", "y", "z"]
        with pytest.raises(RewardError, match=r"gave no answer within 0.05 s; tried "):
            connect(server.url, timeout_s=0.05)(IMAGES)


def test_answers_must_be_text():
    assert _plug.texts(["a", ""], "reward.recogniser") == ["a", ""]
    with pytest.raises(RewardError, match=r"^reward.recogniser gave None for image 1; it must give a string"):
        _plug.texts(["a", None], "reward.recogniser")
