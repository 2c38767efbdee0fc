"""What the CLIP rewards share: where weights are found, what is said when they are not, and the batches."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.errors import InputError
from ddpo_jax.models import clip, weights
from ddpo_jax.rewards._shared import clip as _clip
from ddpo_jax.rewards._shared.batches import in_batches

pytestmark = pytest.mark.usefixtures("nothing_at_home")

PUBLISHED = {  # reward, options -> the file and the repository that a user has to get
    ("aesthetic", "weights=laion"): ("model.safetensors", "openai/clip-vit-large-patch14"),
    ("clip_score", "weights=B/32"): ("pytorch_model.bin", "openai/clip-vit-base-patch32"),
    ("clip_score", "weights=L/14"): ("model.safetensors", "openai/clip-vit-large-patch14"),
    ("hps", "weights=full,version=v2"): ("HPS_v2_compressed.pt", "xswu/HPSv2"),
    ("hps", "weights=full,version=v2.1"): ("HPS_v2.1_compressed.pt", "xswu/HPSv2"),
    ("pickscore", "weights=full"): ("model.safetensors", "yuvalkirstain/PickScore_v1"),
}


@pytest.fixture
def head_file(tmp_path):
    path = tmp_path / "head.safetensors"
    path.touch()
    return path


def make(name, options, head_file, **more):
    module = find.find("rewards", name)
    config = module.default_config()
    given = dict(option.split("=") for option in options.split(",")) | more
    if name == "aesthetic":
        given["head"] = str(head_file)
    config.update(given)
    return module.make(config)


@pytest.mark.parametrize(("name", "options"), PUBLISHED)
def test_absent_weights_are_one_line_that_says_what_to_get(name, options, head_file, tmp_path):
    file, repository = PUBLISHED[name, options]
    with pytest.raises(
        InputError, match=rf": {file} of the hub repository {repository} at revision [0-9a-f]{{40}} "
    ) as caught:
        make(name, options, head_file, weights_dir=str(tmp_path))
    assert str(caught.value).endswith(f"put it at {tmp_path / repository / file}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=rf"reward.clip='/no/clip': no such folder or file; give {file} of the hub"):
        make(name, options, head_file, clip="/no/clip")
    with pytest.raises(InputError, match=rf"no config.json there and no {file}; give {file} of the hub repository"):
        make(name, options, head_file, clip=str(pathlib.Path(__file__).parent))


@pytest.mark.parametrize(
    ("name", "options"), [key for key in PUBLISHED if "v2" != key[1][-2:] and key[0] != "pickscore"]
)
def test_a_file_that_is_not_the_published_one_is_one_line(name, options, head_file, tmp_path):
    file, repository = PUBLISHED[name, options]
    (tmp_path / repository).mkdir(parents=True)
    (tmp_path / repository / file).write_bytes(b"truncated")
    with pytest.raises(InputError, match=r"it has 9 bytes; .* again$") as caught:
        make(name, options, head_file, weights_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "options"), PUBLISHED)
def test_damaged_and_foreign_files_are_one_line(name, options, head_file, tmp_path, clip_folder):
    file, _ = PUBLISHED[name, options]
    for other in clip_folder.iterdir():
        if other.name != "model.safetensors":
            (tmp_path / other.name).write_bytes(other.read_bytes())
    (tmp_path / "config.json").unlink()
    path = tmp_path / file
    path.write_bytes(b"<html>not found</html>")
    for given in (path, tmp_path):
        with pytest.raises(InputError, match=r"^reward.clip='.*not a safetensors file") as caught:
            make(name, options, head_file, clip=str(given))
        assert "\n" not in str(caught.value)


def test_another_networks_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(_clip, "tokenizer_of", lambda *args: None)
    weights.write_safetensors(tmp_path / "unet.safetensors", {"conv_in.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(
        InputError, match=r"do not fit the model: 398 missing: .*1 unexpected: conv_in.weight"
    ) as caught:
        make("clip_score", "weights=B/32", None, clip=str(tmp_path / "unet.safetensors"))
    assert str(caught.value).startswith("reward.clip='") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hps", "pickscore"])
def test_published_networks_of_the_preference_scores_are_h14(name):
    module = find.find("rewards", name)
    for published in module.VERSIONS.values() if name == "hps" else [module.PUBLISHED]:
        assert published.config == clip.H14


def test_a_hub_id_is_taken_at_the_commit_of_the_catalogue(clip_folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns[0]))
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    revision = "32bd64288804d66eefd0ccbe215aa642df71cc41"
    for repo, commit in (("someone/clip", None), ("openai/clip-vit-large-patch14", revision)):
        asked.clear()
        make("clip_score", "weights=L/14", None, clip=repo)
        assert asked == [(repo, commit, "*.json"), (repo, commit, "model.safetensors")]
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(pathlib.Path(__file__).parent)
    )
    with pytest.raises(InputError, match=r"reward.clip='someone/clip': no config.json there and no model.safetensors"):
        make("clip_score", "weights=L/14", None, clip="someone/clip")

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^reward.clip='someone/clip': .*cannot reach the hub.* give its folder$"):
        make("clip_score", "weights=L/14", None, clip="someone/clip")


def test_another_models_tokenizer_is_refused(clip_folder, tmp_path):
    from ddpo_jax.mini.bpe import train_bpe

    for other in clip_folder.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    train_bpe(["a green dragon with a zebra"], 530, tmp_path, max_length=12)
    with pytest.raises(InputError, match=r"has 5\d\d tokens and ends a text with 5\d\d, .* looks for 539"):
        make("clip_score", "weights=B/32", None, clip=str(tmp_path))


def test_batches_pad_and_never_compile_twice():
    traced, prepared, on_device = [], [], []

    class Scale(nnx.Module):
        def __init__(self):
            self.by = nnx.Param(np.float32(3))

    def fn(model, rows):
        traced.append(rows.shape)
        return rows.sum(1) * model.by[...]

    def prepare(rows):
        prepared.append(len(rows))
        on_device.append(sum(x.dtype == np.uint8 and x.shape == (4, 2) for x in jax.live_arrays()))
        return rows[:, ::-1] + np.uint8(1)

    run = in_batches(Scale(), fn, ConfigDict({"batch_size": 4, "device": "mesh"}), prepare)
    for n in (1, 3, 4, 5, 9, 33):
        rows = np.arange(2 * n, dtype=np.uint8).reshape(n, 2)
        out = run(rows)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, 3 * (rows.astype(int) + 1).sum(1))
    assert traced == [(4, 2)]
    assert max(prepared) == 4 and max(on_device) <= 2  # an epoch is never on the device as a whole
