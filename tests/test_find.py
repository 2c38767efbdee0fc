"""Names to modules, and the one line a wrong name gives."""

import importlib
import pathlib

import pytest

import ddpo_jax
from ddpo_jax.find import FAMILIES, available, find, nearest


def message(family, name):
    with pytest.raises(ValueError) as error:
        find(family, name)
    text = str(error.value)
    assert "\n" not in text
    assert family in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_a_family_is_found_by_its_name(family):
    folder = pathlib.Path(ddpo_jax.__file__).parent / family
    names = available(family)
    assert names == sorted(names)
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"ddpo_jax.{family}.{path.stem}")
        assert (path.stem in names) == (callable(getattr(module, "default_config", None)) and path.stem != "__init__")
        if path.stem in names:
            assert find(family, path.stem) is module


def test_unknown_names_are_answered_with_the_nearest():
    text = message("algorithms", "ddpoo")
    assert "there is no 'ddpoo'" in text
    assert "Did you mean 'ddpo'?" in text
    assert ", ".join(available("algorithms")) in text
    assert "Did you mean" not in message("algorithms", "zzzzzzzz")
    assert "there is no family 'reward'. Did you mean 'rewards'?" in message("reward", "x")
    assert "expected a name; received 3 (int)" in message("rewards", 3)
    assert nearest("num_epoch", ["seed", "num_epochs"]) == "num_epochs"
    assert nearest("qqq", ["seed"]) is None


@pytest.fixture
def own(tmp_path, monkeypatch):
    package = tmp_path / "my_package_of_test_find"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("LIMIT = 3\ndef brightness(images):\n    return 1\ndef _hidden(): pass\n")
    (package / "needs.py").write_text("import a_library_nobody_has\n")
    (package / "wrong.py").write_text("1 +\n")
    (package / "raises.py").write_text("raise RuntimeError('no\\nlicence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package.name


def test_own_modules_and_functions(own):
    assert find("rewards", f"{own}.good").LIMIT == 3
    assert find("rewards", f"{own}.good:brightness")(None) == 1


def test_own_modules_that_do_not_work(own):
    assert "there is no module 'nowhere' for 'nowhere.module'" in message("rewards", "nowhere.module")
    assert f"there is no module '{own}.absent'" in message("rewards", f"{own}.absent")
    text = message("rewards", f"{own}.needs")
    assert "cannot be imported: ModuleNotFoundError: No module named 'a_library_nobody_has'" in text
    assert "cannot be imported: SyntaxError" in message("rewards", f"{own}.wrong")
    assert "cannot be imported: RuntimeError: no licence" in message("rewards", f"{own}.raises")
    text = message("rewards", f"{own}.good:brightnes")
    assert "has no 'brightnes'. Did you mean 'brightness'? It defines: brightness" in text
    assert "is a int; expected a function" in message("rewards", f"{own}.good:LIMIT")


@pytest.mark.parametrize("name", ["a..b", ".a", "a.b:", "a.b:c d", "../x.py", "a/b.c", ":f"])
def test_malformed_paths(name):
    assert "is not of the form package.module" in message("prompts", name)
