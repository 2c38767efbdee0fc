"""The trainer of the miniature's vocabulary: a case by hand, and the same bytes from the same texts."""

import json
import subprocess
import sys

import pytest

from ddpo_jax.mini.bpe import train_bpe

TEXTS = [
    "a photo of a red circle, two striped blue squares",
    "a dog playing chess; it's the dog's turn, they're happy, we've won and I'm done",
    "three dotted green triangles left of a plain yellow star",
    "naïve café façade — übergröße",
] * 3


def test_a_row_by_hand(tmp_path):
    """ "aab aab ab": a+b</w> is the most frequent pair (3), then a+ab</w> (2); nothing is left to merge."""
    tokenizer = train_bpe(["aab aab ab"], 600, tmp_path, max_length=6)
    assert tokenizer.merges == [("a", "b</w>"), ("a", "ab</w>")]
    assert tokenizer.vocab_size == 256 + 256 + 2 + 2
    ab, aab, start, end = 512, 513, 514, 515
    assert tokenizer(["AAB ab"]).tolist() == [[start, aab, ab, end, end, end]]
    assert tokenizer(["ab " * 9]).tolist() == [[start, ab, ab, ab, ab, end]]
    assert tokenizer([]).shape == (0, 6)


def test_training_gives_the_same_bytes_in_another_process(tmp_path):
    train_bpe(TEXTS, 700, tmp_path / "here", max_length=24)
    code = (
        "import json,sys; from ddpo_jax.mini.bpe import train_bpe;"
        "train_bpe(json.loads(sys.argv[1]), 700, sys.argv[2], max_length=24)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path / "there")], check=True)
    for path in sorted((tmp_path / "here").iterdir()):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_vocabulary_must_hold_all_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: received 300"):
        train_bpe(TEXTS, 300, tmp_path, max_length=24)
