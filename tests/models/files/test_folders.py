"""Damaged model folders: every file in every way ends in lines that name the file, never in a traceback."""

import json
import os
import pathlib
import shutil

import pytest
import tiny

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import sample
from ddpo_jax.errors import InputError
from ddpo_jax.models import pipeline, schema
from ddpo_jax.models.tokenizer import Tokenizer

JSON_FILES = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer.json",
]
WEIGHT_FILES = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]
UNREADABLE = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"text"',
    "cut": b'{"a": 1, ',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "not utf-8": b'{"a": "\xff\xfe"}',
    "binary": bytes(range(256)),
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that may be damaged: its files are links, so a damaged one must be put in the place of the link."""
    shutil.copytree(whole, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def put(path, content):
    if path.exists():
        path.unlink()
    path.write_bytes(content)


def change(path, **values):
    content = json.loads(path.read_text())
    put(path, json.dumps(content | values).encode())


def refused(folder, *wanted):
    """The lines with which a folder is refused; each names what it speaks of, and all together are short."""
    with pytest.raises(InputError) as error:
        pipeline.load(str(folder))
    lines = str(error.value).splitlines()
    assert lines and all(str(folder) in line for line in lines), lines
    assert all(len(line) < 900 and line.isprintable() for line in lines), lines
    for text in wanted:
        assert any(text in line for line in lines), (text, lines)
    return lines


@pytest.mark.parametrize("file", JSON_FILES)
def test_files_that_are_no_json_objects(folder, file):
    for name, content in UNREADABLE.items():
        put(folder / file, content)
        lines = refused(folder, file)
        assert len(lines) == 1, (name, lines)


@pytest.mark.parametrize("file", JSON_FILES + WEIGHT_FILES + ["tokenizer/merges.txt"])
def test_things_that_are_no_files(folder, file):
    path = folder / file
    path.unlink(missing_ok=True)
    path.mkdir()
    assert len(refused(folder, file)) == 1
    path.rmdir()
    path.symlink_to(path)  # a circle of links
    assert len(refused(folder, file)) == 1
    path.unlink()
    path.symlink_to(folder / "gone")
    assert len(refused(folder, file)) == 1


@pytest.mark.parametrize("file", JSON_FILES[:5] + WEIGHT_FILES)
def test_files_that_are_missing(folder, file):
    (folder / file).unlink()
    assert len(refused(folder, file.split("/")[0])) == 1


@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer/vocab.json", WEIGHT_FILES[0]])
def test_files_that_may_not_be_read(whole, file):
    """Root may read anything and so becomes another user, who may not enter the folder of the other tests either."""
    root = pathlib.Path(os.path.realpath("/tmp")) / f"ddpo-jax-{os.getpid()}"
    shutil.copytree(whole, root)
    try:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        (root / file).chmod(0)
        become(65534)
        try:
            assert len(refused(root, file, "Permission denied")) == 1
        finally:
            become(0)
        (root / file).chmod(0o644)
        (root / file).parent.chmod(0)
        become(65534)
        try:
            assert len(refused(root)) == 1
        finally:
            become(0)
    finally:
        (root / file).parent.chmod(0o755)
        shutil.rmtree(root)


def become(user):
    if os.getuid() == 0:
        os.seteuid(user)


# --- values of the wrong kind or size ---

NEVER = [None, "", "8", "a", [], {}, [[8]], [None], True, -1, float("nan"), float("inf"), 10**30]
COUNT = [*NEVER, 0, 8.5, [8], [8, 8, 8]]
SIDES = [*(value for value in COUNT if value is not None), [8, 0], [8, "8"], [8, True], [8.0, 8]]
LIST = [None, "", "8", {}, [], [0, 8], [8, -8], [8, None], ["8", "8"], [8.0, 8.0], [True, 8], 8, [[8, 8]], [8] * 9]
TYPES = [None, "", "DownBlock2D", {}, [], [0, 8], ["x", "y"], ["DownBlock2D", None], 3, [["DownBlock2D"]]]
SWITCH = [None, "", "no", "true", 0, 1, [], {}, [True], 1.0]
EPSILON = [None, "", "1e-5", 0, -1, 1, True, [], {}, [1e-5], float("nan"), float("inf"), 10**30]
WRONG = {
    "unet/config.json": {
        "sample_size": SIDES,
        "in_channels": COUNT,
        "out_channels": COUNT,
        "down_block_types": TYPES,
        "up_block_types": TYPES,
        "block_out_channels": LIST,
        "layers_per_block": COUNT,
        "cross_attention_dim": COUNT,
        "attention_head_dim": [*NEVER, 0, 8.5, [0, 8], [8, "8"], [8], [8, 8, 8]],
        "use_linear_projection": SWITCH,
        "norm_num_groups": COUNT,
        "norm_eps": EPSILON,
        "flip_sin_to_cos": SWITCH,
        "freq_shift": [*NEVER, 4, [0]],
        "dropout": [None, False, "0", 0.5],
        "class_embed_type": ["timestep", {}, [], 0, False],
        "_class_name": ["AutoencoderKL", 3, None, {}],
    },
    "vae/config.json": {
        "in_channels": [*COUNT, 4],
        "out_channels": [*COUNT, 4],
        "down_block_types": TYPES,
        "up_block_types": TYPES,
        "block_out_channels": LIST,
        "layers_per_block": COUNT,
        "latent_channels": COUNT,
        "norm_num_groups": COUNT,
        "scaling_factor": [*NEVER, 0, [0.2]],
        "use_quant_conv": SWITCH,
        "mid_block_add_attention": SWITCH,
        "act_fn": [None, "relu", 3, {}],
    },
    "text_encoder/config.json": {
        "vocab_size": COUNT,
        "hidden_size": COUNT,
        "intermediate_size": COUNT,
        "num_hidden_layers": COUNT,
        "num_attention_heads": COUNT,
        "max_position_embeddings": COUNT,
        "hidden_act": [None, "", 3, [], {}, ["gelu"]],
        "layer_norm_eps": EPSILON,
        "eos_token_id": NEVER,
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": COUNT,
        "beta_start": EPSILON,
        "beta_end": EPSILON,
        "beta_schedule": [None, "", "sigmoid", 3, [], {}, ["linear"]],
        "trained_betas": ["", "0.1", 0.1, [], {}, [0.1, None], [0.1, "0.1"], [[0.1]], [0.0], [1.0], [float("nan")]],
        "prediction_type": [None, "", "noise", 3, [], {}],
        "timestep_spacing": [None, "", "karras", 3, [], {}],
        "steps_offset": NEVER,
        "set_alpha_to_one": SWITCH,
        "clip_sample": [None, True, 0, "no", [], {}],
        "_class_name": [None, "", 3, [], {}],
    },
    "tokenizer/tokenizer_config.json": {
        "model_max_length": [*COUNT, 1, 1e30],
        "pad_token": ["", 3, [], {}, True, {"content": 3}, {"content": ""}, {"text": "a"}, ["!"]],
        "bos_token": ["", 3, [], {}, True],
        "added_tokens_decoder": [None, 3, "a", [], {"a": {"content": "x"}}, {"1": 3}, {"1": {}}, {"1": {"content": 3}}],
    },
    "tokenizer/special_tokens_map.json": {"pad_token": [3, [], {}, True, {"content": 3}]},
    "model_index.json": {
        "_class_name": [None, "StableDiffusionXLPipeline", 3, {}],
        "unet": [None, "", 3, [], {}, ["diffusers"], ["diffusers", None], [None, None], ["a", "b", "c"], [[], []]],
        "scheduler": [None, "", 3, [], {}, ["diffusers", 3]],
    },
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in WRONG.items() for key in keys])
def test_values_of_the_wrong_kind_or_size(folder, file, key):
    before = (folder / file).read_bytes()
    for value in WRONG[file][key]:
        change(folder / file, **{key: value})
        lines = refused(folder)
        assert f"{folder / file} {key}" in lines[0], (value, lines)
        assert "received" in lines[0] and lines[0].count("; ") >= 2, lines  # received X; rule; fix
        put(folder / file, before)


def test_all_faults_of_a_file_are_told_at_once(folder):
    change(folder / "unet/config.json", norm_eps=None, freq_shift="a", flip_sin_to_cos="no", new_option=1, dropout=0.5)
    lines = refused(folder, "norm_eps: received None; it must be a number in (0, 1)", "new_option: received 1")
    assert len(lines) == 5
    change(folder / "unet/config.json", norm_eps=1e-5, freq_shift=0, flip_sin_to_cos=True, dropout=0.0, sample_size=9)
    content = json.loads((folder / "unet/config.json").read_text())
    del content["new_option"]
    put(folder / "unet/config.json", json.dumps(content | {"norm_num_groups": 3, "attention_head_dim": 3}).encode())
    assert (
        len(refused(folder, "sample_size: received 9; it must be a multiple of 2", "norm_num_groups: received 3")) == 3
    )


def test_parts_of_the_text_encoder_that_do_not_go_together(folder):
    change(folder / "text_encoder/config.json", hidden_size=18, num_attention_heads=4)
    assert len(refused(folder, "text_encoder/config.json")) == 1
    change(folder / "text_encoder/config.json", rotary_base=10_000)
    assert len(refused(folder, "text_encoder/config.json")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "vocabulary: received {}"),
        ({"a": "0"}, "'a': received '0'"),
        ({"a": 1.0}, "received 1.0"),
        ({"a": None}, "received None"),
        ({"a": True}, "received True"),
        ({"a": -1}, "received -1"),
        ({"a": 2**40}, "received 1099511627776"),
        ({"a": 0, "b": 0}, "'b': received 0"),
        ({"a": 0, "b": 2}, "'b': received 2"),
        ({"a": [0]}, "received [0]"),
        ({"\ud800": 0}, "received 0"),
    ],
)
def test_vocabularies(folder, content, message):
    put(folder / "tokenizer/vocab.json", json.dumps(content).encode())
    refused(folder, "tokenizer/vocab.json", message)
    # The same in a tokenizer.json without the two files.
    (folder / "tokenizer/vocab.json").unlink()
    model = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    change(folder / "tokenizer/tokenizer.json", model=model | {"vocab": content})
    refused(folder, "tokenizer/tokenizer.json", message)


@pytest.mark.parametrize("lines", ["a", "a b c", "zz y", "a  b", "\ufeff\x00 a", "a b\r\nc d", "c i\ni r</w>"])
def test_merges(folder, lines, capfd):
    put(folder / "tokenizer/merges.txt", f"#version: 0.2\n{lines}\n".encode())
    refused(folder, "tokenizer/merges.txt merge")
    (folder / "tokenizer/merges.txt").unlink()
    model = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    for merges in (lines.split("\n"), [["a"]], [[1, 2]], [None], None, 3, "a b", {}):
        change(folder / "tokenizer/tokenizer.json", model=model | {"merges": merges})
        refused(folder, "tokenizer/tokenizer.json merge")
    assert "panicked" not in capfd.readouterr().err  # the library would say so even where Python catches it


@pytest.mark.parametrize("model", [None, 3, [], {}, {"type": "WordPiece"}, {"type": "BPE"}])
def test_tokenizers_of_another_kind(folder, model):
    (folder / "tokenizer/vocab.json").unlink()
    change(folder / "tokenizer/tokenizer.json", model=model)
    refused(folder, "only a CLIP byte-level BPE tokenizer is supported")


@pytest.mark.parametrize("added", [3, {"id": 5}, [3], [{"id": "a", "content": "x"}], [{"id": 1, "content": 3}],
                                   [{"id": 1, "content": "x", "special": "yes"}]])  # fmt: skip
def test_added_tokens(folder, added):
    change(folder / "tokenizer/tokenizer.json", added_tokens=added)
    refused(folder, "tokenizer/tokenizer.json added_tokens")


def test_special_tokens_that_no_vocabulary_has(folder):
    change(folder / "tokenizer/special_tokens_map.json", pad_token="<pad>", eos_token="<end>")
    assert len(refused(folder, "pad_token: received '<pad>'; it must be in the vocabulary")) == 2


def test_what_is_free_stays_free(folder, tmp_path):
    """Unused keys hold anything; the sides of an image may differ; a byte order mark is read over; all is kept."""
    change(folder / "unet/config.json", sample_size=[8, 16], freq_shift=0.0, _note={"a": [1]}, upcast_attention="x")
    change(folder / "scheduler/scheduler_config.json", variance_type=3, skip_prk_steps=None)
    change(folder / "tokenizer/tokenizer_config.json", errors=3)
    for file in ("model_index.json", "unet/config.json", "tokenizer/vocab.json"):
        put(folder / file, b"\xef\xbb\xbf" + (folder / file).read_bytes())
    first = pipeline.load(str(folder))
    assert first.latent_shape == (8, 16, 4)
    pipeline.save(first, tmp_path / "again")
    again = json.loads((tmp_path / "again/unet/config.json").read_text())
    assert again["sample_size"] == [8, 16] and again["_note"] == {"a": [1]}
    assert Tokenizer.from_folder(tmp_path / "again/tokenizer").vocab_size == first.tokenizer.vocab_size


# --- weights ---


@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_weights_that_are_cut_short_or_garbage(folder, file):
    content = (folder / file).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1):
        put(folder / file, content[:length])
        assert len(refused(folder, file)) == 1, length
    for garbage in (b"\0" * 100, b"\xff" * 100, content[:8] + b"\0" * header, b"PK\3\4" + content, content[8:]):
        put(folder / file, garbage)
        assert len(refused(folder, file)) == 1


@pytest.mark.parametrize(
    "content",
    [[], None, 3, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": {"x": 3}},
     {"weight_map": {"x": None}}, {"weight_map": {"x": ["a"]}}, {"weight_map": {"x": ""}}, {"weight_map": {"x": ".."}},
     {"weight_map": {"x": "/etc/passwd"}}, {"weight_map": {"x": "../x"}}, {"weight_map": {"x": "gone"}}],
)  # fmt: skip
def test_indices_of_the_wrong_kind(folder, content):
    (folder / WEIGHT_FILES[0]).unlink()
    put(folder / f"{WEIGHT_FILES[0]}.index.json", json.dumps(content).encode())
    assert len(refused(folder, f"{WEIGHT_FILES[0]}.index.json")) == 1


# --- the tables themselves ---


@pytest.mark.parametrize(
    ("table", "key", "good", "bad"),
    [
        (schema.CLIP_VISION, "image_size", [1, 224, 65536], [0, 65537, 224.0, "224", None, True, [224]]),
        (schema.CLIP_VISION, "patch_size", [14, 32], [0, -14, 14.5]),
        (schema.CLIP_VISION, "num_channels", [3], [1, 4, "3", None, 3.5]),
        (schema.CLIP_VISION, "num_hidden_layers", [1, 32, 256], [0, 257, "12"]),
        (schema.CLIP_TEXT, "eos_token_id", [0, 2, 49407], [-1, 1.5, None, [2]]),
        (schema.UNET, "sample_size", [None, 8, [8, 16], (8, 16)], [[8], [8, 16, 3], "8", 8.0]),
        (schema.UNET, "freq_shift", [0, 1, 0.5], [-1, "a", True, float("nan")]),
    ],
)
def test_rules_by_hand(table, key, good, bad):
    assert [value for value in good if schema.faults({key: value}, table)] == []
    assert [value for value in bad if not schema.faults({key: value}, table)] == []


def test_a_command_shows_each_fault_on_a_line_of_its_own(folder, tmp_path, capsys):
    change(folder / "vae/config.json", latent_channels=0, norm_num_groups="4")
    argv = [f"--model={folder}", "--prompt=a", f"--out={tmp_path / 'grid.png'}"]
    assert cli.run(sample.main, argv) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {folder}/vae/config.json latent_channels: received 0; it must be a whole number")
    assert second.startswith(f"error: {folder}/vae/config.json norm_num_groups: received '4'; it must be a whole")
