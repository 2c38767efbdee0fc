"""Prompts that come from files: JSONL, T2I-CompBench, class lists, tensorflow-datasets, and files that hold none."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.errors import InputError
from ddpo_jax.prompts import _text, classes, compbench, make_prompts


def made(name: str, **options):
    config = ConfigDict({"name": name, "samples_per_prompt": 1})
    config.update(find.find("prompts", name).default_config())
    config.update(options)
    return make_prompts(config, find.find("prompts", name))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def refused(content: bytes, path, name: str = "file") -> str:
    """The message with which a file is refused."""
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        made(name, path=str(path))
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"prompts.path: received {str(path)!r}; ")
    return message.removeprefix(f"prompts.path: received {str(path)!r}; ")


# ---- JSONL ----


def test_jsonl_carries_its_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": " two cats ", "objects": ["cat"], "count": 2},
        {"caption": 'a sign that says "OPEN"', "text": "OPEN"},
        {"prompt": "naïve 🎨"},
    ]
    body = "\r\n\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_text("\ufeff" + body, encoding="utf-8")
    prompts, metadata = made("file", path=str(path), shuffle=False)(rng(), 4)
    assert prompts == ["two cats", 'a sign that says "OPEN"', "naïve 🎨", "two cats"]
    assert metadata[0] == {"line": 0, "objects": ["cat"], "count": 2} == metadata[3]
    assert metadata[1] == {"line": 1, "text": "OPEN"} and metadata[2] == {"line": 2}
    assert metadata[0] is not metadata[3]


@pytest.mark.parametrize(
    "content, why",
    [
        (b'{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON: "),
        (b'{"prompt": "a"}\nb\n', "line 2 is not JSON: Expecting value at column 1; write one object a line"),
        (b'["a"]\n', "line 1 is a JSON list, not an object"),
        (b'{"prompt": "a"}\n\n{"text": "b", "n": 1}\n', "line 3 has no prompt: its keys are 'text', 'n'; write"),
        (b"{}\n", "line 1 has no prompt: its keys are none"),
        (b'{"prompt": 7}\n', "line 1 has the prompt 7, which is no text"),
        (b'{"prompt": null}\n', "line 1 has the prompt None, which is no text"),
        (b'{"prompt": "  "}\n', "line 1 is empty; a prompt needs at least one word"),
        (b'{"caption": ""}\n', "line 1 is empty"),
        (b'{"prompt": "a cat \\ud83d"}\n', "line 1 has half of a character (U+D83D, a lone surrogate) at 6"),
        (b'{"prompt": "a\\u0000b"}\n', "line 1 has a zero byte"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "byte 28 is not UTF-8 text"),
        (b'{"prompt": "\xed\xa0\xbd"}\n', "byte 12 is not UTF-8 text"),  # a surrogate is no UTF-8 either
        (b'{"prompt": "%s"}\n' % (b"a" * 10_001), "line 1 has 10001 characters; a prompt may have at most 10000"),
        (b"[" * 100_000, "line 1 is not JSON that can be read"),
        (b"\n \n", "the file has no prompts"),
    ],
)
def test_jsonl_that_is_wrong_is_one_line(tmp_path, content, why):
    assert refused(content, tmp_path / "wrong.jsonl").startswith(why)


def test_a_prompt_of_ten_thousand_characters_is_the_longest(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a" * 10_000)
    assert made("file", path=str(path))(rng(), 1)[0] == ["a" * 10_000]
    start = time.perf_counter()
    assert refused(b"short\n" + b"a cat " * 1_700_000, tmp_path / "huge.txt").startswith("line 2 has 10199999 char")
    assert time.perf_counter() - start < 5


def test_a_line_ends_where_an_editor_ends_it(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\u2028still one\rtwo\x0cstill two\nthree", encoding="utf-8", newline="")
    assert [prompt for _, prompt in _text.lines(str(path))] == ["one\u2028still one", "two\x0cstill two", "three"]


# ---- T2I-CompBench ----


def test_compbench_files(tmp_path):
    (tmp_path / "spatial_train.txt").write_bytes(b"a cat near a dog\r\na bee near a key\r\na cat near a dog\r\n\r\n")
    (tmp_path / "spatial_val.txt").write_bytes(b"a cup near a vase\n")
    assert compbench.prompts(str(tmp_path), "spatial", "training") == ["a cat near a dog", "a bee near a key"]
    drawn, metadata = made("compbench", path=str(tmp_path), category="spatial", split="novel")(rng(), 1)
    assert drawn == ["a cup near a vase"] and metadata == [{"split": "novel", "category": "spatial"}]


@pytest.mark.parametrize(
    "options, faults",
    [
        ({"path": "/nowhere"}, ["prompts.path: received '/nowhere'; there is no such folder; give examples/dataset"]),
        (
            {"category": "colour", "split": "val"},
            [
                "prompts.category: received 'colour'; it must be one of color, shape",
                "prompts.split: received 'val'; it must be one of training, novel",
                "prompts.path: received ''; there is no such folder",
            ],
        ),
    ],
)
def test_compbench_that_is_not_there(options, faults):
    with pytest.raises(InputError) as error:
        made("compbench", **options)
    lines = str(error.value).splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(fault)


def test_compbench_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"color_train.txt'; there is no such file"):
        made("compbench", path=str(tmp_path))


# ---- class lists ----


def test_class_lists(tmp_path):
    path = tmp_path / "imagenet.txt"
    path.write_text(
        "n01440764 tench, Tinca tinca\nn02012849\tcrane\ngreat_white shark\nelectric ray\nn03126707 crane\n"
    )
    assert classes.classes(str(path)) == ["tench", "crane", "great white shark", "electric ray"]
    drawn, metadata = made("classes", path=str(path), template="A painting of a {class}")(rng(), 4)
    assert sorted(drawn) == [
        "A painting of a crane",
        "A painting of a great white shark",
        "A painting of a tench",
        "A painting of an electric ray",
    ]
    assert all(prompt.endswith(item["class"]) for prompt, item in zip(drawn, metadata, strict=True))


@pytest.mark.parametrize(
    "noun, phrase",
    [
        ("owl", "an owl"),
        ("hourglass", "an hourglass"),
        ("unicycle", "a unicycle"),
        ("European fire salamander", "a European fire salamander"),
        ("umbrella", "an umbrella"),
        ("Irish setter", "an Irish setter"),
        ("horse", "a horse"),
    ],
)
def test_articles(noun, phrase):
    assert _text.insert("a {class}", "{class}", noun) == phrase
    assert _text.insert("The {class}", "{class}", noun) == f"The {noun}"


def test_class_lists_that_are_wrong(tmp_path):
    path = tmp_path / "classes.txt"
    assert refused(b"cat\nn01440764 \n", path, "classes").startswith("line 2 names no class: 'n01440764'; write")
    with pytest.raises(InputError, match=r"prompts.template: received 'a photo'; it must contain \{class\}; use"):
        made("classes", path=str(path), template="a photo")
    with pytest.raises(InputError, match=r"prompts.path: received ''; prompts.name=classes needs"):
        made("classes")


# ---- tensorflow-datasets ----


def test_tfds_draws_records_with_their_metadata(tfds_folder):
    source = made("tfds", path=str(tfds_folder), metadata="count, objects")
    prompts, metadata = source(rng(), 30)
    assert sorted(prompts) == sorted(f"prompt {i} é" for i in range(30))  # every record once
    for prompt, item in zip(prompts, metadata, strict=True):
        number = int(prompt.split()[1])
        assert (item["count"], item["objects"]) == (number, ["cat", f"dog {number}"])
        assert type(item["count"]) is int
    assert len({item["record"] for item in metadata}) == 30


def test_tfds_needs_no_position_to_resume(tfds_folder):
    """Epoch 7 is the same whether the epochs before it were drawn or not."""
    source = made("tfds", path=str(tfds_folder))
    drawn = [source(np.random.default_rng([3, epoch]), 5)[0] for epoch in range(9)]
    assert made("tfds", path=str(tfds_folder))(np.random.default_rng([3, 7]), 5)[0] == drawn[7]
    assert len({tuple(prompts) for prompts in drawn}) == 9


def test_tfds_reads_a_part_of_a_split(tfds_folder):
    _, metadata = made("tfds", path=str(tfds_folder), split="train[:10%]")(rng(), 9)
    assert {item["record"] for item in metadata} == {0, 1, 2}


@pytest.mark.parametrize(
    "options, why",
    [
        ({"path": ""}, "prompts.path: received ''; it has no dataset_info.json"),
        ({"path": "/nowhere"}, "prompts.path: received '/nowhere'; it has no dataset_info.json"),
        ({"split": "novel"}, "split 'novel' cannot be read (ValueError: Unknown split 'novel'"),
        ({"feature": "text"}, "it has no feature 'text'; its features are count, image, objects, prompt"),
        ({"metadata": "count,number"}, "it has no feature 'number'"),
        ({"split": "train[:0]"}, "split 'train[:0]' cannot be read"),
    ],
)
def test_tfds_that_is_not_there(tfds_folder, options, why):
    with pytest.raises(InputError) as error:
        made("tfds", **{"path": str(tfds_folder)} | options)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_tfds_refuses_a_record_that_is_no_prompt(tfds_folder):
    with pytest.raises(InputError, match=r"^prompts.feature: received 'prompt'; record 0 is empty"):
        made("tfds", path=str(tfds_folder), split="wrong")(rng(), 1)
    with pytest.raises(InputError, match=r"record \d+ is a int, not text"):
        made("tfds", path=str(tfds_folder), feature="count")(rng(), 1)


def test_tfds_imports_no_tensorflow(tfds_folder):
    """In a process of its own: tests of others may have imported it."""
    code = f"""
import sys
import numpy as np
from ddpo_jax.prompts import tfds
config = tfds.default_config()
config.path = {str(tfds_folder)!r}
print(tfds.make(config)(np.random.default_rng(0), 2)[0], "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['prompt ") and done.stdout.strip().endswith("False")


def test_tfds_without_the_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"^prompts.name: received 'tfds'; .*pip install 'ddpo_jax\[data\]'$"):
        made("tfds", path="/nowhere")
