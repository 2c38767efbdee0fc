"""The JSON files beside reward networks: whatever is in their place is one line that names the file."""

import json

import pytest
import tiny_blip

from ddpo_jax.errors import InputError
from ddpo_jax.mini.verifier import Verifier
from ddpo_jax.models import deberta
from ddpo_jax.models.aesthetic_head import AestheticHeadConfig
from ddpo_jax.models.blip.wordpiece import WordPiece
from ddpo_jax.models.clip import L14
from ddpo_jax.rewards._shared import clip as _clip

WORDS = {token: number for number, token in enumerate(tiny_blip.VOCABULARY)}
BYTES = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "ab": 7}  # with a gap, as published ones may have
DEBERTA = {
    "model_type": "deberta",
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": "c2p|p2c",
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-7,
}
PUBLISHED = _clip.Published("clip_l14", L14)


def bpe(**changes):
    return {"model": {"type": "BPE", "vocab": BYTES, "merges": ["a b"]} | changes}


# name of the file, what it should hold, and what reads it from its folder
READERS = {
    "WordPiece": (
        "tokenizer.json",
        {"model": {"type": "WordPiece", "vocab": WORDS}},
        lambda folder: WordPiece.from_folder(folder, max_length=8)(["red"])[0][0, 1] == WORDS["red"],
    ),
    "DeBERTa tokenizer.json": (
        "tokenizer.json",
        bpe(),
        lambda folder: deberta.Tokenizer.from_folder(folder)(["ab"]).tolist() == [[1, 7, 2]],
    ),
    "DeBERTa vocab.json": (
        "vocab.json",
        BYTES,
        lambda folder: deberta.Tokenizer.from_folder(folder)(["ab"]).tolist() == [[1, 7, 2]],
    ),
    "verifier": ("config.json", {"widths": [8, 16], "blocks": [1, 1]}, Verifier.from_folder),
    "aesthetic head": (
        "config.json",
        {"embed_dim": 24, "_note": "mine"},
        lambda folder: AestheticHeadConfig.from_file(folder / "config.json").embed_dim == 24,
    ),
    "CLIP": (
        "config.json",
        {"projection_dim": 24, "text_config": {"hidden_size": 64, "num_attention_heads": 2}, "vision_config": None},
        lambda folder: _clip.read_config(folder, PUBLISHED).text.hidden_size == 64,
    ),
    "CLIP images": (
        "preprocessor_config.json",
        {"image_mean": [0.5, 0.4, 0.3]},
        lambda folder: _clip.Processor.from_folder(folder, 224).mean == (0.5, 0.4, 0.3),
    ),
    "DeBERTa config": ("config.json", DEBERTA, lambda folder: deberta.load(folder, 1)),
}
SO_FAR = {"verifier": "model.safetensors", "DeBERTa config": "no tokenizer.json"}  # what is missed next


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """(path of the file, its proper content, function that reads it, what a reader of it alone then misses)."""
    name, content, read = READERS[request.param]
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    return tmp_path / name, content, lambda: read(tmp_path), SO_FAR.get(request.param)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_proper_file_is_read_with_or_without_a_byte_order_mark(reader, mark):
    path, content, read, missed = reader
    path.write_text(mark + json.dumps(content), encoding="utf-8")
    if missed is None:
        assert read()
    else:
        with pytest.raises(InputError, match=missed):
            read()


HOSTILE = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "broken": b'{"a": ',
    "deep": b'{"a": ' * 100_000,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": b'{"\xe9": 1}',
    "endless digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_json_object_is_one_line(reader, content):
    path, _, read, _ = reader
    path.write_bytes(content)
    refused(path, read)


def test_a_folder_in_its_place_is_one_line(reader):
    path, _, read, _ = reader
    path.mkdir()
    refused(path, read)


def refused(path, read, *parts):
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and path.name in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("WordPiece", {"model": None}, "model: received the type None; it must be the WordPiece"),
        ("WordPiece", {"model": {"type": "WordPiece"}}, "vocabulary: received None"),
        ("WordPiece", {"model": {"type": "WordPiece", "vocab": {"a": "x"}}}, "'a': received 'x'; it must be an object"),
        ("WordPiece", {"model": {"type": "WordPiece", "vocab": WORDS | {"a": 0}}}, "each once"),
        ("DeBERTa tokenizer.json", {"model": {"type": "Unigram"}}, "only DeBERTa's byte-level BPE tokenizer"),
        ("DeBERTa tokenizer.json", bpe(vocab={"a": 0, "b": 0}), "'b': received 0; it must be an object of texts and"),
        ("DeBERTa tokenizer.json", bpe(vocab={"a": -1}), "'a': received -1"),
        ("DeBERTa tokenizer.json", bpe(vocab={"a": 2**40}), "'a': received 1099511627776"),
        ("DeBERTa tokenizer.json", bpe(merges=["a c"]), "merge 1: received ('a', 'c')"),
        ("DeBERTa tokenizer.json", bpe(merges=None), "merges: received None"),
        ("DeBERTa vocab.json", {"a": True}, "'a': received True"),
        ("verifier", {"widths": [8, 12]}, "widths: received [8, 12]; it must be a list of two multiples of 8"),
        ("verifier", {"blocks": 1}, "blocks: received 1; it must be a list of two whole numbers"),
        ("aesthetic head", {"widths": 3}, "widths: received 3; it must be a list of five whole numbers"),
        ("aesthetic head", {"embed_dim": "24"}, "embed_dim: received '24'"),
        ("CLIP", {"projection_dim": None}, "projection_dim: received None"),
        ("CLIP", {"text_config": "x"}, "text_config: received 'x'; it must be an object"),
        ("CLIP images", {"image_mean": None}, "image_mean: received None; it must be a list of three numbers"),
        ("CLIP images", {"image_std": [0, 1, 1]}, "image_std: received [0, 1, 1]"),
        ("DeBERTa config", {"hidden_size": 32.0}, "hidden_size: received 32.0"),
        ("DeBERTa config", {"num_attention_heads": 0}, "num_attention_heads: received 0"),
        ("DeBERTa config", {"pos_att_type": [1]}, "pos_att_type: received [1]"),
        ("DeBERTa config", {"layer_norm_eps": "small"}, "layer_norm_eps: received 'small'"),
        ("DeBERTa config", {"max_relative_positions": 1e9}, "max_relative_positions: received 1000000000.0"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(tmp_path, name, changes, part):
    file, content, read = READERS[name]
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / file).write_text(json.dumps(content | changes))
    refused(tmp_path / file, lambda: read(tmp_path), part)


def test_a_key_of_the_verifier_may_not_be_left_out(tmp_path):
    (tmp_path / "config.json").write_text('{"widths": [8, 16]}')
    refused(tmp_path / "config.json", lambda: Verifier.from_folder(tmp_path), "it lacks blocks")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8 text"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "'a': received 6; it must be an object of texts"),
        (None, "it cannot be read: IsADirectoryError"),
    ],
)
def test_a_vocab_txt_that_is_none(tmp_path, content, part):
    path = tmp_path / "vocab.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    refused(path, lambda: WordPiece.from_folder(tmp_path, max_length=8), part)
