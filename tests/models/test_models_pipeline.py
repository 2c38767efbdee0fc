"""The pipeline against PyTorch diffusers on tiny random pipelines: folders in and out, embeddings, decoding."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddpo_jax.config.model import PINNED
from ddpo_jax.mini.bpe import train_bpe
from ddpo_jax.models import pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle", "", "two dotted blue squares, isn't it?", "a red circle", "a " * 40]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return functools.cache(lambda kind: build(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def made(request, built):
    """(PyTorch pipeline, its folder): SD-1-like (conv projections, QuickGELU) and SD-2-like (linear, GELU, v)."""
    return built(request.param)


@pytest.fixture(scope="module")
def one(built):
    """The folder of an SD-1-like pipeline."""
    return built("sd1")[1]


def build(kind, folder):
    sd2 = kind == "sd2"
    train_bpe(["a red circle and two dotted blue squares"], 600, folder / "bpe", max_length=16)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "bpe")
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=[2, 4] if sd2 else 2,
            use_linear_projection=sd2,
            norm_num_groups=8,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=16,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                hidden_act="gelu" if sd2 else "quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
            prediction_type="v_prediction" if sd2 else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    return pipe, folder / "theirs"


@pytest.fixture(scope="module")
def ours(made):
    return pipeline.load(str(made[1]))


def states(pipe):
    return {name: getattr(pipe, name).state_dict() for name in ("unet", "vae", "text_encoder")}


def test_torch_to_ours_to_torch_is_the_identity(made, ours, tmp_path):
    theirs, folder = made
    pipeline.save(ours, tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    before, after = states(theirs), states(again)
    for name in before:
        assert list(before[name]) == list(after[name])
        for key, value in before[name].items():
            assert torch.equal(value, after[name][key]), (name, key)
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads((folder / file).read_text()), file
    assert again.safety_checker is None
    twice = pipeline.load(str(tmp_path))
    np.testing.assert_array_equal(twice.embed(PROMPTS), ours.embed(PROMPTS))


def test_written_text_encoder_has_the_keys_of_transformers_4(ours, tmp_path):
    from safetensors import safe_open

    pipeline.save(ours, tmp_path)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "np") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


def test_embeddings_equal_torch(made, ours):
    theirs, _ = made
    ids = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        want = theirs.text_encoder(ids).last_hidden_state.numpy()
    got = ours.embed(PROMPTS)
    assert got.shape == (5, 16, 32) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoded_images_equal_torch(made, ours):
    theirs, _ = made
    latents = np.random.default_rng(0).normal(size=(3, *ours.latent_shape)).astype(np.float32)
    assert latents.shape[1:] == (8, 8, 4) and ours.image_size == (16, 16)
    with torch.no_grad():
        images = theirs.vae.decode(
            torch.tensor(latents.transpose(0, 3, 1, 2)) / theirs.vae.config.scaling_factor
        ).sample
    exact = 255 * (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    got = np.asarray(ours.decode(latents))
    assert got.dtype == np.uint8 and got.shape == (3, 16, 16, 3)
    assert np.abs(got - exact).max() <= 0.5 + 0.02  # rounded to the nearest, up to the networks' rounding
    assert got.std() > 1


def test_sharded_and_sliced_decoding_give_the_same_images(ours, monkeypatch):
    latents = np.random.default_rng(1).normal(size=(8, *ours.latent_shape)).astype(np.float32)
    want = np.asarray(ours.decode(latents))
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(latents, NamedSharding(mesh, P(("data", "fsdp"))))
    got = ours.decode(placed)
    assert len(got.sharding.device_set) == 4
    assert np.abs(np.asarray(got).astype(int) - want).max() <= 1
    monkeypatch.setattr(pipeline, "DECODE_PIXELS", 3 * 16 * 16)
    ours._decoders.clear()
    assert np.abs(np.asarray(ours.decode(latents)).astype(int) - want).max() <= 1


def test_each_distinct_prompt_is_encoded_once_and_the_cache_is_bounded(one):
    pipe = pipeline.load(str(one), cache_size=2)
    encoded = []
    original = pipe._embed_chunk
    pipe._embed_chunk = lambda prompts: encoded.extend(prompts) or original(prompts)
    want = pipe.embed(["a", "b", "a", "c"])
    assert encoded == ["a", "b", "c"] and len(pipe._cache) == 2
    encoded.clear()
    np.testing.assert_array_equal(pipe.embed(["c", "b"]), want[[3, 1]])
    assert encoded == []
    np.testing.assert_allclose(pipe.embed(["a"])[0], want[0], atol=1e-5)
    assert encoded == ["a"] and "c" not in pipe._cache  # c was used before b
    assert pipe.embed([]).shape == (0, 16, 32)


def test_frozen_parts_may_stay_on_the_host(one):
    ours = pipeline.load(str(one))
    pipe = pipeline.load(str(one), frozen_on_host=True)
    assert {type(x) for x in jax.tree.leaves(nnx.state(pipe.vae))} == {np.ndarray}
    np.testing.assert_allclose(pipe.embed(PROMPTS), ours.embed(PROMPTS), atol=1e-6)


def edit(folder, file, **changes):
    content = json.loads((folder / file).read_text())
    content.update(changes)
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ("model_index.json", {"unet_2": ["diffusers", "UNet2DConditionModel"]}, "unet_2"),
        ("text_encoder/config.json", {"hidden_size": 48, "num_attention_heads": 4}, "text_encoder: the tensors"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("vae/config.json", {"latent_channels": 8}, "vae: the tensors"),
    ],
)
def test_unsupported_folders_are_refused(one, tmp_path, file, changes, message):
    shutil.copytree(one, tmp_path / "f")
    edit(tmp_path / "f", file, **changes)
    with pytest.raises(ValueError, match=message) as error:
        pipeline.load(str(tmp_path / "f"))
    assert "\n" not in str(error.value)


def test_parts_of_different_models_are_refused(one):
    ours = pipeline.load(str(one))
    parts = dict(unet=ours.unet, vae=ours.vae, text_encoder=ours.text_encoder, configs=ours.configs)
    short = type(ours.tokenizer).from_folder(one / "tokenizer")
    short.max_length = 77
    with pytest.raises(ValueError, match="tokenizer gives 77"):
        pipeline.Pipeline(**parts, tokenizer=short)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "no such folder"),
        ("./nothing", "no such folder"),
        ("owner/name", "HF_HUB_OFFLINE"),  # the suite runs offline
        (".", "no model_index.json"),
    ],
)
def test_sources_that_lead_nowhere(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        pipeline.load(source)
    assert "\n" not in str(error.value)


def test_hub_download_asks_only_for_what_is_needed(one, tmp_path, monkeypatch):
    """A stand-in for the hub: the repository holds several variants of the weights; one of each part is fetched."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    remote, cache = tmp_path / "remote", tmp_path / "snapshots" / "0123abc"
    shutil.copytree(one, remote)
    for extra in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (remote / extra).write_bytes(b"not wanted")
    (remote / "v1-5-pruned.ckpt").write_bytes(b"not wanted")
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        for file in remote.rglob("*"):
            name = file.relative_to(remote).as_posix()
            if file.is_file() and list(filter_repo_objects([name], allow_patterns=allow_patterns)):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pipe = pipeline.load(repo)
    assert pipe.revision == "0123abc"
    assert set(asked) == {(repo, PINNED[repo])}
    names = {file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file()}
    assert not any("fp16" in name or "non_ema" in name or "ckpt" in name for name in names)
    pipeline.load(repo, revision="fp16")
    assert asked[-1] == (repo, "fp16")
