"""Adapter files of every wrong kind, by the reader and by ``ddpo_jax sample --lora=FILE``: one line each."""

import json
import os

import numpy as np
import pytest

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import sample
from ddpo_jax.errors import InputError
from ddpo_jax.models import lora
from ddpo_jax.models.weights import write_safetensors

A, B = "unet.a.lora_A.weight", "unet.a.lora_B.weight"
PAIR = {A: (2, 3), B: (4, 2)}
GOOD = {"unet.r": 2, "unet.lora_alpha": 2}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapters.safetensors"


def write(file, tensors, options=None, dtype=np.float32):
    """Tensors of the given shapes; options are an object, or the text that stands in its place."""
    text = options if isinstance(options, str) else json.dumps({} if options is None else options)
    write_safetensors(file, {name: np.ones(shape, dtype) for name, shape in tensors.items()},
                      {"lora_adapter_metadata": text})  # fmt: skip


def refused(file, message, capsys):
    """Refused by the reader, and by the command, which need not load the model for it."""
    with pytest.raises(InputError) as error:
        lora.load(file)
    said = str(error.value)
    assert said.startswith(str(file)) and message in said and "\n" not in said and len(said) < 500, said
    argv = ["--model=mini", f"--lora={file}", "--prompt=a", f"--out={file.parent / 'grid.png'}"]
    assert cli.run(sample.main, argv) == 2
    assert capsys.readouterr().err == f"error: --lora: {said}\n"


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "received no tensors; it must hold pairs"),
        ({A: (2, 3)}, {}, "received half of a; it must hold pairs"),
        ({B: (4, 2)}, {}, "received half of a; it must hold pairs"),
        ({"unet.a.lora_A.bias": (2,)}, {}, "received unet.a.lora_A.bias; it must hold pairs"),
        ({A: (2, 3), "text_encoder.a.lora_A.weight": (2, 3)}, {}, "received text_encoder.a.lora_A.weight"),
        ({A: (2, 3, 1, 1), B: (4, 2, 1, 1)}, {}, f"received {A}, {B}; it must hold pairs"),
        ({A: (0, 3), B: (4, 0)}, {}, f"received {A}, {B}; it must hold pairs"),
        ({A: (), B: ()}, {}, f"received {A}, {B}; it must hold pairs"),
        ({"x" * 5000: (1,)}, {}, "received xxx"),
        ({A: (2, 3), B: (4, 3)}, {}, "a has lora_A of rank 2 and lora_B of rank 3; both must be of rank 2"),
        (PAIR, GOOD | {"unet.r": 3}, "a has lora_A of rank 2 and lora_B of rank 2; both must be of rank 3"),
        (PAIR | {"unet.b.lora_A.weight": (3, 3), "unet.b.lora_B.weight": (4, 3)}, GOOD, "b has lora_A of rank 3"),
        (PAIR, {"unet.use_dora": True}, "received use_dora"),
        (PAIR, {"unet.alpha_pattern": {"a": 3}}, "received alpha_pattern"),
        (PAIR, {"use_rslora": True}, "received use_rslora"),
        *((PAIR, GOOD | {"unet.r": value}, "lora_adapter_metadata r: received")
          for value in (0, -2, 2.0, "2", None, [], {}, True, 10**30)),
        *((PAIR, GOOD | {"unet.lora_alpha": value}, "lora_adapter_metadata lora_alpha: received")
          for value in (0, -2, "2", None, [], {}, True, float("nan"), float("inf"), 10**30)),
        *((PAIR, text, "lora_adapter_metadata: received")
          for text in ("", "[]", "null", "3", '"text"', "{", "[" * 100_000, '{"a":' * 100_000, "\ud800".encode("utf-8",
            "surrogatepass").decode("utf-8", "replace"))),
    ],
)  # fmt: skip
def test_wrong_adapters(file, capsys, tensors, options, message):
    write(file, tensors, options)
    refused(file, message, capsys)


def test_numbers_that_are_none(file, capsys):
    write(file, PAIR, dtype=np.int32)
    refused(file, f"received {A}, {B}; it must hold pairs", capsys)
    for value in (np.nan, np.inf):
        write_safetensors(file, {A: np.full((2, 3), value, np.float32), B: np.ones((4, 2), np.float32)})
        refused(file, "a.lora_down is not finite everywhere; use a file without NaN", capsys)


def header(entries, data=b"\0" * 8):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}.",
        b"\xff" * 100,
        header([]),
        header({"__metadata__": 3}),
        header({"__metadata__": []}),
        header({"__metadata__": {"a": 3}}),
        header({"__metadata__": {"lora_adapter_metadata": {"r": 2}}}),
        header({A: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}),
        header({A: 3}),
    ],
)
def test_files_that_are_no_safetensors(file, capsys, content):
    file.write_bytes(content)
    refused(file, "", capsys)


def test_things_that_are_no_files(file, capsys):
    refused(file, "no such file", capsys)
    file.mkdir()
    refused(file, "", capsys)
    file.rmdir()
    os.symlink(file, file)
    refused(file, "", capsys)


def test_the_scale_of_ranks_that_differ(file):
    """Where the header says that ranks differ, each layer is scaled by its own: alpha / rank."""
    write(file, PAIR | {"unet.b.lora_A.weight": (3, 3), "unet.b.lora_B.weight": (4, 3)},
          {"unet.r": 2, "unet.lora_alpha": 6, "unet.rank_pattern": {"b": 3}})  # fmt: skip
    params = lora.load(file)
    np.testing.assert_array_equal(params["a.lora_up"], np.full((2, 4), 3.0))
    np.testing.assert_array_equal(params["b.lora_up"], np.full((3, 4), 2.0))
    np.testing.assert_array_equal(params["b.lora_down"], np.ones((3, 3)))


def test_files_of_half_precision_are_read(file):
    write(file, PAIR, GOOD, np.float16)
    assert {value.dtype for value in lora.load(file).values()} == {np.dtype(np.float32)}
