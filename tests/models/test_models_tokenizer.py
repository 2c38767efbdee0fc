"""The tokenizer against transformers' CLIPTokenizer, from every layout a folder may have."""

import gzip
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers

from ddpo_jax.mini.bpe import train_bpe
from ddpo_jax.models.tokenizer import Tokenizer

TEXTS = [
    "a photo of a red circle, two striped blue squares",
    "a dog playing chess; it's the dog's turn, they're happy, we've won and I'm done",
    "three dotted green triangles left of a plain yellow star",
    "naïve café façade — übergröße",
] * 3

AWKWARD = [
    "",
    " ",
    "a",
    "A   RED\t\ncircle  ",
    "don't they're I'LL we've it's 'tis 'S",
    "!!! ??? ... ,,, ;;; --- ___ !?!?",
    "1234567890 3.14159 2nd 50%",
    "naïve café ÜBER ﬁne ﬃ Ⅷ ²",
    "cafe\u0301 vs caf\u00e9",  # decomposed and composed
    "\u4f60\u597d\u4e16\u754c こんにちは 안녕",
    "🐶🐱👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "zero\u200bwidth \u00a0nbsp\u3000wide",
    "İstanbul ǅ ſ",
    "<|endoftext|> inside <|startoftext|> text<|endoftext|>more",
    "<|ENDOFTEXT|>",
    "</w> a</w>b #version: 0.2",
    "supercalifragilisticexpialidocious" * 8,
    "red circle " * 60,
    "\x00\x07\x7f control",
    "a photo of <cat-toy> here",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 700, path, max_length=24)
    return path


def theirs(path, texts):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids


def copy(folder, out, names):
    out.mkdir(exist_ok=True)
    for name in names:
        (out / name).write_bytes((folder / name).read_bytes())
    return out


@pytest.mark.parametrize("layout", ["all", "vocab and merges", "tokenizer.json"])
def test_equals_transformers(folder, tmp_path, layout):
    common = ["tokenizer_config.json", "special_tokens_map.json"]
    names = {
        "all": [*common, "vocab.json", "merges.txt", "tokenizer.json"],
        "vocab and merges": [*common, "vocab.json", "merges.txt"],
        "tokenizer.json": [*common, "tokenizer.json"],
    }[layout]
    path = copy(folder, tmp_path / "t", names)
    got = Tokenizer.from_folder(path)(AWKWARD)
    assert got.dtype == np.int32 and got.shape == (len(AWKWARD), 24)
    for text, ours, want in zip(AWKWARD, got, theirs(path, AWKWARD), strict=True):
        np.testing.assert_array_equal(ours, want, err_msg=repr(text))


def test_equals_transformers_on_random_unicode(folder):
    rng = np.random.default_rng(0)
    pool = "ab  CD'st.,!09-é\u0301ßñ中🐶\u200d\n\u00a0Ωя"
    texts = ["".join(rng.choice(list(pool), size=rng.integers(0, 40))) for _ in range(300)]
    np.testing.assert_array_equal(Tokenizer.from_folder(folder)(texts), theirs(folder, texts))


def test_special_tokens_map_has_the_last_word_as_in_sd2(folder, tmp_path):
    """SD 2.x pads with "!": its special_tokens_map.json says so, its tokenizer_config.json says otherwise."""
    names = ["tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    path = copy(folder, tmp_path / "t", names)
    (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    ours = Tokenizer.from_folder(path)
    assert ours.pad_token_id == json.loads((path / "vocab.json").read_text())["!"]
    assert ours.pad_token_id != ours.eos_token_id
    np.testing.assert_array_equal(ours(AWKWARD), theirs(path, AWKWARD))
    ours.save(tmp_path / "again")
    np.testing.assert_array_equal(theirs(tmp_path / "again", AWKWARD), theirs(path, AWKWARD))


def test_added_tokens_of_a_textual_inversion(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_folder(tmp_path / "theirs")
    np.testing.assert_array_equal(ours(AWKWARD), theirs(tmp_path / "theirs", AWKWARD))
    ours.save(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(tmp_path / "ours", AWKWARD), theirs(tmp_path / "theirs", AWKWARD))
    np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path / "ours")(AWKWARD), ours(AWKWARD))


def test_real_clip_vocabulary_where_open_clip_ships_it(tmp_path):
    """The published vocabulary: 49 408 ids, the ids of "a photo of a cat", and transformers on awkward strings."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(x + "</w>" for x in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, merges, max_length=77)
    assert tokenizer.vocab_size == 49408
    row = tokenizer(["a photo of a cat"])[0]
    assert row[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokenizer.save(tmp_path)
    np.testing.assert_array_equal(tokenizer(AWKWARD), theirs(tmp_path, AWKWARD))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer here"),
        ({"tokenizer.json": {"model": {"type": "WordPiece"}}}, "CLIP"),
        ({"tokenizer.json": "keep", "tokenizer_config.json": {"model_max_length": 10**30}}, "model_max_length"),
        (
            {"tokenizer.json": "keep", "tokenizer_config.json": {"pad_token": "<pad>"}},
            "pad_token: received '<pad>'",
        ),
    ],
)
def test_unusable_folders_are_refused(folder, tmp_path, files, message):
    for name, content in files.items():
        source = (folder / name).read_text() if content == "keep" else json.dumps(content)
        (tmp_path / name).write_text(source)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path)
