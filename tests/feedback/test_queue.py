"""The queue of questions: who gets what, what is asked again, what the answers amount to."""

import json
import pathlib
import threading
import time

import numpy as np
import pytest
from http_tools import read_png

from ddpo_jax.errors import InputError
from ddpo_jax.feedback.answers import image_name
from ddpo_jax.feedback.queue import Queue, Stopped
from ddpo_jax.serving.server import Refusal

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
NAMES = [image_name(image) for image in IMAGES]
NUMBER = {name: number for number, name in enumerate(NAMES)}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Rating:
    """A queue, and ``rate`` running on it in a thread."""

    def __init__(self, folder, images=IMAGES[:3], prompts=("a", "a", "b"), mode="score", opponents=0, lease_s=60.0):
        self.clock = Clock()
        self.queue = Queue(pathlib.Path(folder), mode, opponents, lease_s, self.clock)
        self.result = self.error = None
        self._thread = threading.Thread(target=self._run, args=(images, list(prompts)), daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self.queue.next("watcher")["total"]:
            time.sleep(0.005)
        self.clock.now += 1000  # what the watcher was handed is free again

    def _run(self, images, prompts):
        try:
            self.result = self.queue.rate(images, prompts, "http://here")
        except Exception as error:
            self.error = error

    def finish(self):
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.result

    def answer(self, page, value, rater=None):
        """Answers the question that the page has; returns the number of the image, or those of the pair."""
        task = self.queue.next(page)["task"]
        chosen = value(task) if callable(value) else value
        self.queue.answer(page, rater or page, task["id"], chosen)
        return tuple(NUMBER[name] for name in task["images"])


def lines(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "answers.jsonl").read_text().splitlines()]


def test_a_batch_is_rated(tmp_path):
    rating = Rating(tmp_path / "new" / "folder")
    state = rating.queue.next("page")
    assert (state["mode"], state["done"], state["total"], state["undo"]) == ("score", 0, 3, False)
    assert state["task"]["prompt"] == "a" and state["task"]["images"] == [NAMES[0]]
    assert [rating.answer("page", value, "Ann") for value in (4, 1, 5)] == [(0,), (1,), (2,)]
    scores = rating.finish()
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [4, 1, 5])
    records = lines(tmp_path / "new" / "folder")
    assert [(r["kind"], r["rater"], r["prompt"], r["image"], r["score"]) for r in records] == [
        *(("score", "Ann", "a", NAMES[0], 4), ("score", "Ann", "a", NAMES[1], 1), ("score", "Ann", "b", NAMES[2], 5))
    ]
    assert len({r["batch"] for r in records}) == 1 and len(records[0]["batch"]) == 16
    for name, image in zip(NAMES[:3], IMAGES, strict=False):
        data = (tmp_path / "new" / "folder" / "images" / f"{name}.png").read_bytes()
        np.testing.assert_array_equal(read_png(data), image)
    assert rating.queue.next("page")["total"] == 0  # nothing is asked any more


def test_every_page_gets_another_question_and_keeps_it(tmp_path):
    rating = Rating(tmp_path)
    first, second, third = (rating.queue.next(page)["task"]["id"] for page in "xyz")
    assert len({first, second, third}) == 3
    assert rating.queue.next("x")["task"]["id"] == first  # reloaded
    state = rating.queue.next("late")
    assert state["task"] is None and state["total"] == 3 and state["people"] == 4
    rating.answer("y", 3)
    assert rating.queue.next("late")["task"] is None
    rating.clock.now += 30
    assert rating.queue.next("z")["people"] == 2  # x still looks at its image, the others have gone


def test_what_is_not_answered_in_time_is_handed_out_again(tmp_path):
    rating = Rating(tmp_path, IMAGES[:1], "a", lease_s=60)
    task = rating.queue.next("slow")["task"]
    rating.clock.now += 59
    assert rating.queue.next("quick")["task"] is None
    rating.clock.now += 2
    assert rating.queue.next("quick")["task"] == task
    assert rating.queue.next("slow")["task"] is None
    rating.queue.answer("slow", "slow", task["id"], 2)  # still the first answer
    with pytest.raises(Refusal, match="no longer asked|someone else") as caught:
        rating.queue.answer("quick", "quick", task["id"], 5)
    assert caught.value.status == 409
    np.testing.assert_array_equal(rating.finish(), [2])


def test_a_second_answer_to_a_question_is_refused_but_a_repeated_one_is_not(tmp_path):
    rating = Rating(tmp_path)
    task = rating.queue.next("x")["task"]
    after = rating.queue.answer("x", "ann", task["id"], 4)
    assert after["done"] == 1
    again = rating.queue.answer("x", "ann", task["id"], 4)  # the reply was lost, the page sent it once more
    assert again["done"] == 1 and again["task"] == after["task"] and len(lines(tmp_path)) == 1
    with pytest.raises(Refusal, match="someone else has rated this meanwhile"):
        rating.queue.answer("y", "bob", task["id"], 1)
    with pytest.raises(Refusal, match="no longer asked about"):
        rating.queue.answer("y", "bob", "0" * 32, 1)


@pytest.mark.parametrize("value", [0, 6, 2.0, "3", None, True, [1]])
def test_what_is_no_score_is_refused(tmp_path, value):
    rating = Rating(tmp_path)
    task = rating.queue.next("x")["task"]
    with pytest.raises(Refusal, match="it must be 1 to 5"):
        rating.queue.answer("x", "ann", task["id"], value)
    assert not (tmp_path / "answers.jsonl").exists() and rating.queue.next("x")["task"] == task


def test_the_last_answer_can_be_taken_back_while_the_batch_is_open(tmp_path):
    rating = Rating(tmp_path)
    with pytest.raises(Refusal, match="no answer of yours"):
        rating.queue.undo("x")
    first = rating.queue.next("x")["task"]
    rating.answer("x", 5)
    rating.answer("y", 1)
    assert rating.queue.next("x")["undo"]
    state = rating.queue.undo("x")
    assert (state["task"], state["done"], state["undo"]) == (first, 1, False)
    rating.answer("x", 2)
    rating.answer("x", 3)
    np.testing.assert_array_equal(rating.finish(), [2, 3, 1])  # y had the third while x held the second
    assert [line["kind"] for line in lines(tmp_path)] == ["score", "score", "undo", "score", "score"]
    with pytest.raises(Refusal, match="no answer of yours"):
        rating.queue.undo("x")  # the scores are in use


def test_a_half_rated_batch_survives_a_restart(tmp_path):
    rating = Rating(tmp_path)
    rating.answer("x", 5)
    rating.answer("x", 1)
    rating.queue.undo("x")
    rating.queue.close()
    rating.finish()
    assert isinstance(rating.error, Stopped) and "1 of 3 answers given, which are kept" in str(rating.error)
    again = Rating(tmp_path)
    state = again.queue.next("x")
    assert (state["done"], state["total"], state["task"]["images"]) == (1, 3, [NAMES[1]])
    again.answer("x", 2)
    again.answer("x", 3)
    np.testing.assert_array_equal(again.finish(), [5, 2, 3])
    third = Queue(tmp_path, "score", 0, 60.0)  # of a batch that was rated before nothing is asked
    np.testing.assert_array_equal(third.rate(IMAGES[[2, 0]], ["b", "a"], ""), [3, 5])


def test_an_answer_belongs_to_the_image_and_the_prompt(tmp_path):
    rating = Rating(tmp_path, IMAGES[[0, 0, 0]], ["a", "a", "b"])
    assert rating.queue.next("x")["total"] == 2  # the same image for the same prompt is asked once
    assert [rating.answer("x", value) for value in (5, 1)] == [(0,), (0,)]
    np.testing.assert_array_equal(rating.finish(), [5, 5, 1])


def test_several_people_share_a_batch(tmp_path):
    rating = Rating(tmp_path, IMAGES, ["a"] * 6)
    given = {}

    def work(page):
        while True:
            task = rating.queue.next(page)["task"]
            if task is None:
                return
            number = NUMBER[task["images"][0]]
            rating.queue.answer(page, page, task["id"], 1 + number % 5)
            given.setdefault(page, []).append(number)

    people = [threading.Thread(target=work, args=(page,)) for page in "uvw"]
    for person in people:
        person.start()
    for person in people:
        person.join(10)
    np.testing.assert_array_equal(rating.finish(), [1, 2, 3, 4, 5, 1])
    assert sorted(number for numbers in given.values() for number in numbers) == list(range(6))
    assert sorted(line["rater"] for line in lines(tmp_path)) == sorted(p for p, n in given.items() for _ in n)


# ---- pairs ----


def left(task):
    return task["images"][0]


def test_the_score_is_the_share_of_comparisons_won(tmp_path):
    """Image 0 beats 1 and 2, 1 and 2 are equal; of the other prompt, 3 loses to 4."""
    better = {(0, 1): 0, (0, 2): 0, (1, 2): None, (3, 4): 4}
    rating = Rating(tmp_path, IMAGES[:5], "aaabb", mode="pairs")

    def value(task):
        winner = better[tuple(sorted(NUMBER[name] for name in task["images"]))]
        return None if winner is None else NAMES[winner]

    assert rating.queue.next("x")["total"] == 4
    for _ in range(4):
        rating.answer("x", value)
    np.testing.assert_allclose(rating.finish(), [1, 0.25, 0.25, 0, 1])
    records = lines(tmp_path)
    assert {(r["kind"], r["prompt"]) for r in records} == {("pair", "a"), ("pair", "b")}
    for record in records:
        winner = better[tuple(sorted(NUMBER[name] for name in record["images"]))]
        assert record["better"] == (None if winner is None else NAMES[winner])
    again = Queue(tmp_path, "pairs", 0, 60.0)
    np.testing.assert_allclose(again.rate(IMAGES[:5], list("aaabb"), ""), [1, 0.25, 0.25, 0, 1])


@pytest.mark.parametrize(
    ("count", "opponents", "pairs", "fewest"),
    [(2, 3, 1, 1), (4, 3, 6, 3), (4, 0, 6, 3), (4, 1, 4, 2), (6, 2, 6, 2), (6, 3, 12, 4), (6, 0, 15, 5), (6, 5, 15, 5)],
)
def test_how_many_comparisons_are_asked(tmp_path, count, opponents, pairs, fewest):
    """All pairs where that is asked for or few; else about as many as asked, the same number for every image."""
    rating = Rating(tmp_path, IMAGES[:count], "a" * count, mode="pairs", opponents=opponents)
    asked = [rating.answer("x", left) for _ in range(rating.queue.next("x")["total"])]
    rating.finish()
    met = [sum(number in pair for pair in asked) for number in range(count)]
    assert len({tuple(sorted(pair)) for pair in asked}) == len(asked) == pairs
    assert set(met) == {fewest} and fewest >= min(opponents or count, count - 1)


def test_the_sides_favour_nobody(tmp_path):
    """Of 60 pairs of fresh images, the one that comes first in the batch is left about half of the time."""
    images = np.random.default_rng(0).integers(0, 256, (120, 4, 4, 3), dtype=np.uint8)
    prompts = [str(i // 2) for i in range(120)]
    numbers = {image_name(image): number for number, image in enumerate(images)}
    rating = Rating(tmp_path, images, prompts, mode="pairs")
    shown = [rating.queue.next(f"page {i}")["task"]["images"] for i in range(60)]
    first_is_left = sum(numbers[one] < numbers[other] for one, other in shown)
    rating.queue.close()
    assert 18 <= first_is_left <= 42  # three standard deviations


def test_identical_images_are_equal_and_a_single_one_is_refused(tmp_path):
    queue = Queue(tmp_path, "pairs", 0, 60.0)
    np.testing.assert_array_equal(queue.rate(IMAGES[[0, 0]], ["a", "a"], ""), [0.5, 0.5])
    with pytest.raises(ValueError, match="'b' has one image in this batch.*samples_per_prompt must be at least 2"):
        queue.rate(IMAGES[:3], ["a", "a", "b"], "")


@pytest.mark.parametrize("value", ["left", 1, NAMES[5], [NAMES[0]], True])
def test_what_is_no_choice_is_refused(tmp_path, value):
    rating = Rating(tmp_path, IMAGES[:2], "aa", mode="pairs")
    task = rating.queue.next("x")["task"]
    with pytest.raises(Refusal, match="it must be the name of one of the images, or null"):
        rating.queue.answer("x", "ann", task["id"], value)


# ---- trouble ----


def test_an_answer_that_cannot_be_saved_is_asked_again(tmp_path, monkeypatch):
    rating = Rating(tmp_path)
    task = rating.queue.next("x")["task"]

    def full(folder, record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("ddpo_jax.feedback.answers.append", full)
        rating.queue.answer("x", "ann", task["id"], 4)
    assert rating.queue.next("x")["task"] == task and rating.queue.next("x")["done"] == 0
    rating.queue.answer("x", "ann", task["id"], 4)
    assert rating.queue.next("x")["done"] == 1


def test_broken_answers_stop_a_run_before_it_starts(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"kind": "score"}\n')
    with pytest.raises(InputError, match="answers.jsonl: line 1: 'prompt' is None"):
        Queue(tmp_path, "score", 0, 60.0)


def test_the_log_says_what_is_waited_for_at_growing_intervals(tmp_path, monkeypatch):
    from ddpo_jax.feedback import queue

    said = []
    monkeypatch.setattr(queue, "FIRST_NOTICE_S", 0.02)
    monkeypatch.setattr(queue.logging, "info", lambda text, *args: said.append((time.monotonic(), text % args)))
    waiting = Queue(tmp_path, "score", 0, 60.0)
    threading.Timer(1.0, waiting.close).start()
    with pytest.raises(Stopped):
        waiting.rate(IMAGES[:2], ["a", "a"], "http://here")
    own = "waiting for people: 0 of 2 answers given; rate at http://here"  # threads of other tests may speak too
    times = [when for when, text in said if text == own]
    assert 3 <= len(times) <= 8  # at 0, 0.02, 0.04, 0.08, ... not at every 0.02
    assert times[-1] - times[-2] > times[2] - times[1]
