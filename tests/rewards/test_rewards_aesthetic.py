"""The aesthetic reward: the published head's anchor values, and the whole chain against transformers and torch."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.models import aesthetic_head, clip, weights
from ddpo_jax.rewards import aesthetic
from ddpo_jax.rewards._shared import clip as _clip

pytestmark = pytest.mark.usefixtures("nothing_at_home")

FILE = "sac+logos+ava1-l14-linearMSE.pth"


def configured(**options):
    config = aesthetic.default_config()
    config.update(options)
    return config


def torch_head(width, seed=0):
    """The upstream module: linear layers with dropout between some of them."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    ).eval()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(3)
    return layers


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({f"layers.{name}": value for name, value in torch_head(24).state_dict().items()}, path)
    return path


def published_head():
    """LAION's head, of which the repository holds no copy: in the folder ``shared`` beside it, or in DDPO_SHARED."""
    root = pathlib.Path(__file__).resolve().parents[2]
    path = pathlib.Path(os.environ.get("DDPO_SHARED", root.parent / "shared")) / "weights" / FILE
    if not path.is_file():
        pytest.fail(
            f"{path} is not there: this test needs {FILE} of the repository "
            "christophschuhmann/improved-aesthetic-predictor in weights/ of the folder that DDPO_SHARED names"
        )
    return path


def test_published_head_gives_the_anchor_values():
    head = aesthetic.load_head(published_head(), 768)
    constant = np.full(768, 768**-0.5)
    embeddings = np.stack([constant, np.eye(768)[0], 40 * constant]).astype(np.float32)
    scores = np.asarray(aesthetic_head.score(head, embeddings))
    np.testing.assert_allclose(scores, [4.883285, 4.545052, 4.883285], atol=5e-6)


def test_the_published_head_is_found_in_a_folder_of_weights(clip_folder, tmp_path):
    (tmp_path / FILE).write_bytes(published_head().read_bytes())
    config = configured(weights="laion", clip=str(clip_folder), weights_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"reward.head=.*1 of wrong shape: layers.0.weight \[1024, 768\]"):
        aesthetic.make(config)  # found, verified and read: it only is not this small CLIP's


def test_another_file_under_the_published_name_is_refused(clip_folder, tmp_path):
    data = bytearray(published_head().read_bytes())
    data[-2000] ^= 1
    (tmp_path / FILE).write_bytes(data)
    config = configured(weights="laion", clip=str(clip_folder), head=str(tmp_path / FILE))
    with pytest.raises(InputError, match=r"^reward.head=.*sha256 is [0-9a-f]{64}; that of .* is 21dd590f") as caught:
        aesthetic.make(config)
    assert "\n" not in str(caught.value)


def test_the_published_head_wants_the_published_clip(clip_folder):
    config = configured(weights="laion", clip=str(clip_folder), head=str(published_head()))
    with pytest.raises(InputError, match=r"reward.head=.*0.weight \[1024, 768\] instead of \[1024, 24\]"):
        aesthetic.make(config)


def test_whole_chain_is_transformers_and_the_upstream_head(clip_model, clip_folder, head_file, images, processed):
    torch = pytest.importorskip("torch")
    reward = aesthetic.make(configured(weights="laion", clip=str(clip_folder), head=str(head_file), batch_size=4))
    scores, parts = reward(images, [""] * 5, [{}] * 5)
    with torch.no_grad():
        features = clip_model.get_image_features(pixel_values=processed(images))
        features = features.pooler_output
        expected = torch_head(24)(features / features.norm(dim=-1, keepdim=True))[:, 0].numpy()
    assert parts == {} and scores.dtype == np.float32
    assert expected.std() > 0.05
    np.testing.assert_allclose(scores, expected, atol=2e-3 * expected.std())


def test_folder_layout_of_the_embedded_weights(clip_folder, head_file, images, tmp_path, monkeypatch):
    tensors = weights.read_pickle_tensors(head_file)
    weights.write_safetensors(tmp_path / "aesthetic" / "head.safetensors", tensors)
    note = {"embed_dim": 24, "widths": [1024, 128, 64, 16, 1], "_rating": "what it rewards"}
    (tmp_path / "aesthetic" / "config.json").write_text(json.dumps(note))
    (tmp_path / "clip").symlink_to(clip_folder)
    given = aesthetic.make(configured(weights="laion", clip=str(clip_folder), head=str(head_file)))(images, [], [])[0]
    monkeypatch.setattr(_clip, "ASSETS", tmp_path)
    embedded = aesthetic.make(configured(weights="mini"))(images, [], [])[0]
    np.testing.assert_array_equal(embedded, given)

    (tmp_path / "aesthetic" / "config.json").write_text(json.dumps(note | {"embed_dim": 768}))
    with pytest.raises(InputError, match=r"reward.head=.*width 768, but reward.clip gives 24"):
        aesthetic.make(configured(weights="mini"))
    (tmp_path / "aesthetic" / "config.json").write_text(json.dumps(note | {"width": 1}))
    with pytest.raises(InputError, match=r"unknown width; it may hold embed_dim, widths"):
        aesthetic.make(configured(weights="mini"))


def test_missing_and_wrong_weights_are_named(clip_folder, head_file, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"reward.weights='auto': must be mini or laion"):
        aesthetic.make(configured())
    with pytest.raises(
        InputError, match=r"sac.*\.pth is not there, and no model hub has it; get it from the repository chr"
    ):
        aesthetic.make(configured(weights="laion"))  # said before the CLIP is read, or even downloaded
    with pytest.raises(InputError, match=r"reward.head='/no/head': no such file; give LAION's sac.*\.pth"):
        aesthetic.make(configured(weights="laion", head="/no/head"))
    with pytest.raises(
        InputError,
        match=r"reward.clip='/no/clip': no such folder or file; give model.safetensors of the hub repository openai/",
    ):
        aesthetic.make(configured(weights="laion", clip="/no/clip", head=str(head_file)))
    with pytest.raises(InputError, match=r"reward.clip=.*no config.json there and no model.safetensors"):
        aesthetic.make(configured(weights="laion", clip=str(tmp_path), head=str(head_file)))
    monkeypatch.setattr(_clip, "ASSETS", tmp_path)
    with pytest.raises(InputError, match=r"reward.weights='mini'.*'aesthetic' weights.*ddpo_jax pretrain"):
        aesthetic.make(configured(weights="mini"))
    weights.write_safetensors(tmp_path / "odd.safetensors", {"layers.0.weight": np.zeros((1024, 7), np.float32)})
    with pytest.raises(InputError, match=r"reward.head=.*9 missing: layers.0.bias.*layers.0.weight \[1024, 7\]"):
        aesthetic.make(configured(weights="laion", clip=str(clip_folder), head=str(tmp_path / "odd.safetensors")))


@pytest.mark.slow
def test_published_head_on_a_clip_of_the_published_size(tmp_path):
    """The whole reward at full size, on 512x512 pictures; only the CLIP's weights are random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    towers = dataclasses.asdict(clip.L14)
    config = transformers.CLIPConfig(text_config=towers["text"], vision_config=towers["vision"], projection_dim=768)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3), dtype=np.uint8)
    pictures = np.concatenate([noise, np.zeros((1, 512, 512, 3), np.uint8)])
    options = {"weights": "laion", "clip": str(tmp_path), "head": str(published_head()), "batch_size": 3}
    scores, _ = aesthetic.make(configured(**options))(pictures, [""] * 3, [{}] * 3)

    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = processor()(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.no_grad():
        x = model.get_image_features(pixel_values=pixels).pooler_output.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    layers = weights.read_pickle_tensors(published_head())
    for i in (0, 2, 4, 6, 7):
        x = x @ layers[f"layers.{i}.weight"].T.astype(np.float64) + layers[f"layers.{i}.bias"]
    print(f"scores {scores}, max abs error {np.abs(scores - x[:, 0]).max():.2e}")
    np.testing.assert_allclose(scores, x[:, 0], atol=1e-4)
