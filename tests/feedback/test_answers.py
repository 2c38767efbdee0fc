"""The file of answers: what counts, what it amounts to, what a damaged one says."""

import hashlib
import json
import os

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.feedback import answers
from ddpo_jax.feedback.answers import Answers, Pair, Question, append, image_name, lookup, read, win_shares


def score(image, value, rater="ann", prompt="a cat"):
    return {"kind": "score", "rater": rater, "batch": "b", "prompt": prompt, "image": image, "score": value}


def pair(left, right, better, rater="ann", prompt="a cat"):
    return {"kind": "pair", "rater": rater, "batch": "b", "prompt": prompt, "images": [left, right], "better": better}


def undo(*images, rater="ann", prompt="a cat"):
    return {"kind": "undo", "rater": rater, "batch": "b", "prompt": prompt, "images": list(images)}


def test_scores_are_means_over_raters_of_their_last_answers():
    found = Answers([score("x", 2), score("x", 5, "bob"), score("y", 1), score("x", 4), score("x", 1, prompt="a dog")])
    assert found.scores() == {("x", "a cat"): 4.5, ("y", "a cat"): 1.0, ("x", "a dog"): 1.0}
    assert found.value(Question("a cat", ("x",))) == 4.5 and found.value(Question("a fox", ("x",))) is None
    assert found.pairs() == [] and found.wins() == {}


def test_pairs_do_not_depend_on_the_side_and_ties_count_half():
    found = Answers([pair("y", "x", "x"), pair("x", "y", None, "bob"), pair("y", "z", "y"), pair("x", "z", "z")])
    assert found.pairs() == [
        Pair("a cat", ("x", "y"), 0.75, 2),
        Pair("a cat", ("y", "z"), 1.0, 1),
        Pair("a cat", ("x", "z"), 0.0, 1),
    ]
    # x: 0.75 of one comparison and 0 of one; y: 0.25 and 1; z: 0 and 1
    assert found.wins() == {("x", "a cat"): 0.375, ("y", "a cat"): 0.625, ("z", "a cat"): 0.5}
    assert found.scores() == {}


def test_win_shares_by_hand():
    """Three images of one prompt, a beats b and c, b and c are equal; another prompt knows nothing of them."""
    shares = win_shares([("p", "a", "b", 1.0), ("p", "c", "a", 0.0), ("p", "b", "c", 0.5), ("q", "a", "b", 0.0)])
    assert shares == {
        **{("a", "p"): 1.0, ("b", "p"): 0.25, ("c", "p"): 0.25},
        **{("a", "q"): 0.0, ("b", "q"): 1.0},
    }


def test_an_answer_taken_back_does_not_count():
    found = Answers([score("x", 2), score("x", 5, "bob"), undo("x")])
    assert found.scores() == {("x", "a cat"): 5.0}
    found.add(undo("x", rater="bob"))
    assert found.scores() == {} and found.value(Question("a cat", ("x",))) is None
    found = Answers([pair("x", "y", "x"), undo("y", "x"), undo("y", "x")])
    assert found.pairs() == []


def test_a_question_is_the_same_in_every_run():
    assert Question("a cat", ("x", "y")) == Question("a cat", ("y", "x"))
    assert Question("a cat", ("x", "y")).id == hashlib.sha256(b"x\ny\na cat").hexdigest()[:32]
    assert len({Question(*q).id for q in (("a", ("x",)), ("a", ("y",)), ("b", ("x",)), ("a", ("x", "y")))}) == 4
    assert Question("\ud800", ("x",)).id  # a prompt that is not UTF-8


def test_images_are_named_by_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert image_name(image) == hashlib.sha256(b"4x6:" + image.tobytes()).hexdigest()
    assert image_name(image.transpose(1, 0, 2)) != image_name(image)
    assert image_name(np.zeros((2, 3, 3), np.uint8)) != image_name(np.zeros((3, 2, 3), np.uint8))
    strided = np.repeat(image, 2, axis=0)[::2]
    assert not strided.flags.c_contiguous and image_name(strided) == image_name(image)


def test_what_is_appended_is_read_again(tmp_path):
    assert read(tmp_path).scores() == {}
    append(tmp_path, score("x", 3, "Zoë", "a\ncat \ud800"))
    append(tmp_path, pair("x", "y", None))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("ascii").splitlines()]
    assert [line["kind"] for line in lines] == ["score", "pair"]
    assert lines[0]["rater"] == "Zoë" and lines[0]["time"].endswith("+00:00") and "time" in lines[1]
    found = read(tmp_path)
    assert found.scores() == {("x", "a\ncat \ud800"): 3.0} and found.pairs()[0].preference == 0.5


def test_a_line_that_was_cut_off_is_left_out_and_then_replaced(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(tmp_path, score("x", 3))
    whole = file.read_bytes()
    for cut in (1, 10, len(whole) - 1):
        file.write_bytes(whole + whole[:cut])
        assert read(tmp_path).scores() == {("x", "a cat"): 3.0}
        append(tmp_path, score("y", 1))
        assert len(file.read_bytes().splitlines()) == 2
        assert read(tmp_path).scores() == {("x", "a cat"): 3.0, ("y", "a cat"): 1.0}
    file.write_bytes(whole[:-5])
    append(tmp_path, score("y", 1))
    assert read(tmp_path).scores() == {("y", "a cat"): 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"[" * 100000, "recursion"),
        (b"\xff", "utf-8"),
        (b"[]", "it is not a JSON object"),
        (b"{}", "'kind' is None; it must be text"),
        (json.dumps(score("x", 6)).encode(), "'score' is 6; it must be 1 to 5"),
        (json.dumps(score("x", "3")).encode(), "'score' is '3'; it must be a whole number"),
        (json.dumps(score("x", True)).encode(), "'score' is True"),
        (json.dumps(score(3, 3)).encode(), "'image' is 3; it must be text"),
        (json.dumps(pair("x", "x", "x")).encode(), "it must name 2 different images"),
        (json.dumps(pair("x", "y", "z")).encode(), "'better' is 'z'; it must be one of 'images', or null"),
        (json.dumps(pair("x", 3, "x")).encode(), "it must be a list of names"),
        (json.dumps(undo()).encode(), "it must be a list of names"),
        (json.dumps(score("x", 3) | {"kind": "like"}).encode(), "'kind' is 'like'; it must be score, pair or undo"),
        (json.dumps(score("x", 3) | {"prompt": None}).encode(), "'prompt' is None"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    append(tmp_path, score("x", 3))
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'answers.jsonl'}: line 2: ") and "\n" not in text and len(text) < 500


def test_a_folder_in_the_place_of_the_file_is_one_line(tmp_path):
    os.mkdir(tmp_path / "answers.jsonl")
    with pytest.raises(InputError, match="answers.jsonl: cannot be read: Is a directory"):
        read(tmp_path)


def test_scores_of_images_for_evaluation(tmp_path):
    """What ``evaluate`` asks: the images of a run, and what people said of those that they saw."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    names = [image_name(image) for image in images]
    for record in (score(names[0], 5), score(names[0], 2, "bob"), score(names[1], 1, prompt="a dog")):
        append(tmp_path, record)
    found = lookup(read(tmp_path).scores(), images, ["a cat", "a cat", "a cat"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([3.5, np.nan, np.nan]))
    append(tmp_path, pair(names[2], names[0], names[2]))
    found = lookup(read(tmp_path).wins(), images, ["a cat"] * 3)
    np.testing.assert_array_equal(found, np.float32([0, np.nan, 1]))


def test_an_answer_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(answers.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    append(tmp_path, score("x", 3))
    assert synced == [(tmp_path / "answers.jsonl").stat().st_size]
