"""BLIP's published files: found in the folders that the user names, verified, and asked for in one line if absent."""

import dataclasses
import hashlib
import pathlib
import shutil

import numpy as np
import pytest

from ddpo_jax import find
from ddpo_jax.errors import InputError
from ddpo_jax.models import weights

pytestmark = pytest.mark.usefixtures("nothing_at_home")

FILES = {  # reward -> entry of the catalogue, repository, file
    "image_reward": ("image_reward", "THUDM/ImageReward", "ImageReward.pt"),
    "vqa": ("blip_vqa", "Salesforce/blip-vqa-capfilt-large", "model.safetensors"),
}
VOCABULARY = pathlib.Path("google-bert/bert-base-uncased/vocab.txt")
PROMPTS = ["a red circle", "the blue square"]


@pytest.fixture
def pin(monkeypatch):
    """``pin(entry, content)``: the published file is one of that content; without any it is not pinned."""

    def change(name, content=b""):
        digest = hashlib.sha256(content).hexdigest() if content else ""
        changed = dataclasses.replace(weights.entry(name), sha256=digest, bytes=len(content))
        monkeypatch.setitem(weights.entries(), name, changed)

    return change


@pytest.fixture(params=FILES)
def placed(request, tmp_path):
    """(name of the reward, folder of its small files, a folder that has them as the hub's repositories would)."""
    given = pathlib.Path(request.getfixturevalue(f"{request.param}_options")["blip"])
    _, repository, file = FILES[request.param]
    for source, target in ((file, pathlib.Path(repository) / file), ("vocab.txt", VOCABULARY)):
        (tmp_path / target).parent.mkdir(parents=True)
        shutil.copy(given / source, tmp_path / target)
    return request.param, given, tmp_path


def make(name, **options):
    module = find.find("rewards", name)
    config = module.default_config()
    config.update(options)
    return module.make(config)


def test_published_files_are_found_and_give_the_scores_of_the_folder(placed, pin, images, monkeypatch):
    name, given, folder = placed
    entry, repository, file = FILES[name]
    pin(entry, (folder / repository / file).read_bytes())
    pin("bert_vocabulary", (folder / VOCABULARY).read_bytes())
    want = make(name, blip=str(given))(images[:2], PROMPTS, [{}] * 2)[0]
    assert np.ptp(want) > 0
    found = make(name, weights_dir=str(folder))(images[:2], PROMPTS, [{}] * 2)[0]
    np.testing.assert_array_equal(found, want)
    monkeypatch.setenv("DDPO_WEIGHTS", str(folder))
    np.testing.assert_array_equal(make(name)(images[:2], PROMPTS, [{}] * 2)[0], want)


def refused(name, **options):
    with pytest.raises(InputError) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_absent_files_are_one_line_that_says_what_to_get(placed, pin):
    name, _, folder = placed
    entry, repository, file = FILES[name]
    pin(entry)
    (folder / VOCABULARY).unlink()
    message = refused(name, weights_dir=str(folder))
    assert message.startswith("weights bert_vocabulary: vocab.txt of the hub repository google-bert/bert-base-uncased")
    assert message.endswith(f"put it at {folder / VOCABULARY}")
    (folder / repository / file).unlink()
    message = refused(name, weights_dir=str(folder))
    assert message.startswith(f"weights {entry}: {file} of the hub repository {repository}")
    assert message.endswith(f"put it at {folder / repository / file}")


def test_other_files_than_the_published_ones_are_refused(placed, pin):
    name, _, folder = placed
    entry, _, file = FILES[name]
    pin(entry)
    assert "it has" in (message := refused(name, weights_dir=str(folder))) and "bert_vocabulary has 231508" in message
    pin(entry, b"what its authors published")
    assert f"{entry} has 26; delete it and get {file}" in refused(name, weights_dir=str(folder))
