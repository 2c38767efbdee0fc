"""The WordPiece tokenizer against transformers' two BERT tokenizers, one of them in plain Python, and by hand."""

import json

import numpy as np
import pytest
import tiny_blip

from ddpo_jax import errors
from ddpo_jax.models.blip.wordpiece import WordPiece

AWKWARD = [
    "",
    " ",
    "a red circle, the blue squares!",
    "The RED   circle\t\nSquared",
    "don't 'tis it's",
    "?!?... , ' ''",
    "1234567890 3.14 2nd",
    "naïve café Ångström ÜBER",
    "cafe\u0301 vs caf\u00e9",
    "\u4f60中\u4e16hello中 こんにちは 안녕",
    "🐶🐱 hello 👩‍👩‍👧‍👦",
    "zero\u200bwidth \u00a0nbsp\u3000wide",
    "İstanbul ǅ ſ ß",
    "[ENC] red [SEP] [DEC]circle[PAD] [CLS] [MASK] [unused0] [UNK]",
    "[enc] ##s ##",
    "hello" * 30,
    "red circle " * 40,
    "\x00\x07red\x7f\ufffd control\u0085",
    "the-red_circle/blue\\square",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wordpiece")
    tiny_blip.write_vocabulary(path)
    return path


def theirs(cls, folder, texts, length):
    """As BLIP's code makes it: [DEC] and [ENC] follow the vocabulary."""
    tokenizer = cls.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    return np.array(out["input_ids"]), np.array(out["attention_mask"])


@pytest.mark.parametrize("which", ["tokenization_bert.BertTokenizer", "tokenization_bert_legacy.BertTokenizerLegacy"])
def test_equals_transformers(folder, which):
    bert = pytest.importorskip("transformers.models.bert")
    module, name = which.split(".")
    ours = WordPiece.from_folder(folder, max_length=35)
    ids, mask = ours(AWKWARD)
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (len(AWKWARD), 35)
    want_ids, want_mask = theirs(getattr(getattr(bert, module), name), folder, AWKWARD, 35)
    for text, *rows in zip(AWKWARD, ids, want_ids, mask, want_mask, strict=True):
        np.testing.assert_array_equal(rows[0], rows[1], err_msg=repr(text))
        np.testing.assert_array_equal(rows[2], rows[3], err_msg=repr(text))


def test_rows_by_hand(folder):
    ours = WordPiece.from_folder(folder, max_length=8)
    number = {token: index for index, token in enumerate(tiny_blip.VOCABULARY)}
    assert (ours.decode_id, ours.encode_id) == (len(number), len(number) + 1)
    assert ours.vocab_size == len(number) + 2
    assert ours.id("yes") == number["yes"]
    ids, mask = ours(["Red circles?", "blue  sqed \u0415", "the the the the the the the the"])
    expected = [
        ["[CLS]", "red", "circle", "##s", "?", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "blue", "s", "##q", "##ed", "[UNK]", "[SEP]", "[PAD]"],
        ["[CLS]", *["the"] * 6, "[SEP]"],
    ]
    assert ids.tolist() == [[number[token] for token in row] for row in expected]
    assert mask.sum(1).tolist() == [6, 7, 8]
    assert [array.shape for array in ours([])] == [(0, 8), (0, 8)]


def test_tokenizer_json_gives_the_same(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").is_file()
    for got, want in zip(
        *(WordPiece.from_folder(at, max_length=35)(AWKWARD) for at in (tmp_path, folder)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", b"", "received no vocab.txt; put that of google-bert/bert-base-uncased there"),
        ("vocab.txt", b"a\nb\n", r"vocab.txt: the vocabulary has no \[PAD\], \[UNK\], \[CLS\]"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt: byte 0 is not UTF-8 text"),
        ("tokenizer.json", b"{", "tokenizer.json: it cannot be read as JSON"),
        ("tokenizer.json", json.dumps({"model": {"type": "BPE", "vocab": {}}}).encode(), "received the type .BPE."),
    ],
)
def test_unusable_folders_are_refused(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.InputError, match=message) as caught:
        WordPiece.from_folder(tmp_path, max_length=35)
    assert "\n" not in str(caught.value)


def test_an_unknown_token_has_no_id(folder):
    with pytest.raises(errors.InputError, match="the vocabulary has no 'maybe'"):
        WordPiece.from_folder(folder, max_length=35).id("maybe")
