"""Prompt sources: the conformance of every source, the papers' animals, files, the user's own function."""

import json.tool

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.mini import world
from ddpo_jax.prompts import animals, draw, file, make_prompts, mini


def made(name: str, **options):
    config = ConfigDict({"name": name, "samples_per_prompt": 1})
    if ":" not in name:
        config.update(find.find("prompts", name).default_config())
    config.update(options)
    return make_prompts(config, find.find("prompts", name))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", find.available("prompts"))
def test_every_source_conforms(name, options):
    source = made(name, **options(name))
    prompts, metadata = source(rng(), 70)
    assert len(prompts) == len(metadata) == 70
    assert all(type(prompt) is str and prompt == prompt.strip() and prompt for prompt in prompts)
    assert all(type(item) is dict for item in metadata)
    assert source(rng(), 70) == (prompts, metadata)  # the generator alone decides
    assert source(rng(1), 70)[0] != prompts
    metadata[0]["x"] = 1
    assert "x" not in source(rng(), 70)[1][0]


def test_draw_is_uniform_and_repeats_only_after_a_round():
    counts = np.zeros(5, int)
    for seed in range(2000):
        indices = draw(rng(seed), 5, 7)
        assert indices.shape == (7,) and np.bincount(indices, minlength=5).max() <= 2
        assert len(set(indices[:5])) == 5
        counts += np.bincount(indices, minlength=5)
    # 2 of 5 in the second round: variance 2000 * 0.4 * 0.6 = 480; five standard deviations = 110
    assert np.abs(counts - 2000 * 7 / 5).max() < 110


def test_animals_are_those_of_the_papers():
    training, novel = animals.animals("training"), animals.animals("novel")
    assert len(training) == len(set(training)) == 45 and (training[0], training[-1]) == ("cat", "kangaroo")
    assert len(novel) == len(set(novel)) == 45 and (novel[0], novel[-1]) == ("elephant", "salamander")
    assert not set(training) & set(novel)
    prompts, metadata = made("animals", template="A painting of a {animal}")(rng(), 45)
    assert {item["animal"] for item in metadata} == set(training)
    assert "A painting of an ant" in prompts and "A painting of a zebra" in prompts


def test_article():
    assert animals.sentence("a {animal}", "cat") == "a cat"
    assert animals.sentence("a {animal}", "owl") == "an owl"
    assert animals.sentence("A {animal} and a tree", "eagle") == "An eagle and a tree"
    assert animals.sentence("{animal}", "ant") == "ant"
    assert animals.sentence("manga {animal} of a {animal}", "ant") == "manga ant of an ant"


@pytest.mark.parametrize(
    "split, category, expected",
    [
        ("training", "all", world.training_prompts),
        ("novel", "all", world.novel_prompts),
        ("training", "numeracy", lambda: world.prompts("numeracy", "train")),
        ("novel", "texture", lambda: world.prompts("texture", "novel")),
    ],
)
def test_mini_draws_the_whole_set(split, category, expected):
    drawn, metadata = made("mini", split=split, category=category)(rng(), len(expected()))
    assert sorted(drawn) == sorted(expected())
    assert metadata[0] == {"split": split, "category": category}


def test_mini_large_is_large_and_distinct():
    drawn, _ = made("mini", split="large")(rng(), 1000)
    assert len(set(drawn)) == 1000 and len(mini.prompts("large", "all")) > 100_000


def test_mini_counts_the_same_prompts_in_every_run():
    drawn, _ = made("mini", category="color", count=4)(rng(), 8)
    again, _ = made("mini", category="color", count=4)(np.random.default_rng(5), 8)
    assert len(set(drawn)) == 4 and set(drawn) == set(again) <= set(world.prompts("color", "train"))
    everything = [mini.prompts("training", "texture", count) for count in (0, 112)]
    assert sorted(everything[0]) == sorted(everything[1])


def test_file_lines(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffun café\r\n\r\n  a dog \r\nlast".encode())
    assert file.read(str(path)) == [("un café", {"line": 0}), ("a dog", {"line": 1}), ("last", {"line": 2})]
    drawn, metadata = made("file", path=str(path), shuffle=False)(rng(), 4)
    assert drawn == ["un café", "a dog", "last", "un café"]
    assert [item["line"] for item in metadata] == [0, 1, 2, 0]
    assert sorted(made("file", path=str(path))(rng(), 3)[0]) == ["a dog", "last", "un café"]


@pytest.mark.parametrize(
    "name, options, line",
    [
        ("file", {}, "prompts.path: received ''; prompts.name=file needs a file with one prompt"),
        ("file", {"path": "/nowhere.txt"}, "prompts.path: received '/nowhere.txt'; there is no such file"),
        ("file", {"path": "/"}, "prompts.path: received '/'; it is a folder"),
        ("mini", {"split": "test"}, "prompts.split: received 'test'; it must be one of training, novel, large"),
        ("mini", {"count": 49}, "prompts.count: received 49; the set has 48 prompts"),
        ("mini", {"count": -1}, "prompts.count: received -1; it must be a whole number >= 0"),
        ("mini", {"category": "size"}, "prompts.category: received 'size'; it must be one of all, color"),
        ("mini", {"split": "large", "category": "color"}, "prompts.category: received 'color'; split 'large'"),
        ("animals", {"split": "all"}, "prompts.split: received 'all'"),
        ("animals", {"template": "an animal"}, "prompts.template: received 'an animal'; it must contain {animal}"),
    ],
)
def test_wrong_options_are_one_line(name, options, line):
    with pytest.raises(ValueError) as error:
        made(name, **options)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, why",
    [(b"", "no prompts"), (b" \n\t\r\n", "no prompts"), (b"a\n\xff\xfe", "byte 2 is not UTF-8"), (b"a\n\0b", "line 2")],
)
def test_files_that_are_no_prompts(tmp_path, content, why):
    path = tmp_path / "wrong.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        made("file", path=str(path))
    assert str(error.value).startswith(f"prompts.path: received {str(path)!r}; ") and why in str(error.value)


OWN = """
import numpy as np
def plain(rng, n): return [f"thing {rng.integers(10)}" for _ in range(n)]
def array(rng, n): return np.array(["a", "b"])[rng.integers(0, 2, n)]
def full(rng, n): return ["x"] * n, [{"i": i} for i in range(n)]
def short(rng, n): return ["x"] * (n - 1)
def text(rng, n): return "x" * n
def numbers(rng, n): return [1] * n
def bare(rng, n): return ["x"] * n, ["y"] * n
def empty(rng, n): return ["x", " "] * (n // 2)
def endless(rng, n): return ["x", "y" * 10_001] * (n // 2)
def half(rng, n): return ["x", "cat \\ud83d"] * (n // 2)
def raises(rng, n): raise KeyError("no\\nluck")
constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_own_functions(own):
    prompts, metadata = made(f"{own}:plain")(rng(), 3)
    assert prompts == [f"thing {i}" for i in [rng().integers(10), *rng().integers(0, 10, 3)[1:]]]
    assert metadata == [{}, {}, {}] and metadata[0] is not metadata[1]
    assert made(f"{own}:full")(rng(), 2) == (["x", "x"], [{"i": 0}, {"i": 1}])
    assert all(type(prompt) is str for prompt in made(f"{own}:array")(rng(), 4)[0])


@pytest.mark.parametrize(
    "function, why",
    [
        ("short", "it returned 3 prompts; called with (rng, 4) it must return 4 strings"),
        ("text", "it returned a str"),
        ("numbers", "prompt 0 is 1 (int)"),
        ("bare", "its metadata is 4 items; it must be 4 dictionaries"),
        ("raises", "raised KeyError: 'no"),
        ("empty", "prompt 1 is empty; a prompt needs at least one word"),
        ("endless", "prompt 1 has 10001 characters; a prompt may have at most 10000"),
        ("half", "prompt 1 has half of a character (U+D83D, a lone surrogate) at 4"),
    ],
)
def test_own_functions_that_return_something_else(own, function, why):
    source = made(f"{own}:{function}")
    with pytest.raises(ValueError) as error:
        source(rng(), 4)
    text = str(error.value)
    assert text.startswith((f"prompts.name: received '{own}:{function}'; ", f"prompts.name={own}:{function}: "))
    assert why in text
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["{}:missing", "{}:constant", "{}_no:plain", "{}.", "mine:"])
def test_own_functions_that_are_not_there(own, name):
    with pytest.raises(ValueError) as error:
        made(name.format(own))
    assert "\n" not in str(error.value)


def test_own_module_without_make():
    with pytest.raises(ValueError, match="no function make"):
        make_prompts(ConfigDict({"name": "json.tool", "samples_per_prompt": 1}), json.tool)
