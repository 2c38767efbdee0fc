"""A small CLIP with random weights that transformers wrote, and where the published weights are, for all rewards."""

import os
import pathlib

import numpy as np
import pytest
import tiny_blip

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def published_head():
    """LAION's aesthetic head, of which the repository holds no copy."""
    folder = pathlib.Path(os.environ.get("DDPO_JAX_WEIGHTS", ROOT.parent / "shared" / "weights"))
    path = folder / "sac+logos+ava1-l14-linearMSE.pth"
    if not path.is_file():
        pytest.skip(f"{path} is absent; put the published head there or set DDPO_JAX_WEIGHTS to its folder")
    return path


@pytest.fixture(scope="session")
def clip_model():
    """L/14 in proportions (patch 14, QuickGELU, projection as wide as the text tower), small in every dimension."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 540,
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "eos_token_id": 539,
            "bos_token_id": 538,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # the default initialisation is so small that all images look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="session")
def clip_folder(clip_model, tmp_path_factory):
    """The model as a folder with tokenizer and processor, as a hub repository has it."""
    transformers = pytest.importorskip("transformers")
    from ddpo_jax.mini.bpe import train_bpe

    folder = tmp_path_factory.mktemp("clip")
    clip_model.save_pretrained(folder)
    words = ["a red circle left of a blue square", "two striped green stars", "a photo of a dog"]
    train_bpe(words, 540, folder, max_length=12)
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_reward_model():
    """ImageReward with small random weights, by transformers and torch."""
    pytest.importorskip("transformers")
    return tiny_blip.image_reward()


@pytest.fixture(scope="session")
def image_reward_options(image_reward_model, tmp_path_factory):
    """What ``reward.*`` needs beyond its defaults to run here."""
    return {"blip": str(tiny_blip.write_image_reward(tmp_path_factory.mktemp("image_reward"), image_reward_model))}


@pytest.fixture(scope="session")
def vqa_model():
    """BLIP-VQA with small random weights, by transformers."""
    pytest.importorskip("transformers")
    return tiny_blip.vqa()


@pytest.fixture(scope="session")
def vqa_options(vqa_model, tmp_path_factory):
    """What ``reward.*`` needs beyond its defaults to run here."""
    return {"blip": str(tiny_blip.write_vqa(tmp_path_factory.mktemp("vqa"), vqa_model))}


@pytest.fixture(scope="session")
def images():
    """u8[5,72,60,3]: smooth colours with some noise, all different."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:72, 0:60] / 60
    waves = rng.uniform(1, 9, (5, 1, 1, 3, 2))
    smooth = np.sin(waves[..., 0] * y[None, :, :, None] + waves[..., 1] * x[None, :, :, None])
    return np.clip(127 + 110 * smooth + rng.normal(0, 12, (5, 72, 60, 3)), 0, 255).astype(np.uint8)
