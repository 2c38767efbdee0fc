"""Small CLIPs with random weights in the formats they are published in, and pictures, for all rewards."""

import json

import numpy as np
import open_clip_oracle
import pytest
import tiny_blip

from ddpo_jax.models import clip


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
def h14_model():
    """H/14 in proportions: the exact GELU, heads of the image tower 80 wide, a projection as wide as the text tower."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 540, "max_position_embeddings": 12, "eos_token_id": 539, "bos_token_id": 538}
    vision |= {"image_size": 56, "patch_size": 14}
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": "gelu"}, vision_config={**vision, "hidden_act": "gelu"}, projection_dim=32
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        model.logit_scale.fill_(np.log(97.0))
    return model


@pytest.fixture(scope="session")
def h14_config(h14_model):
    """Its config in our words, as it stands for clip.H14."""
    return clip.CLIPConfig.from_dict(h14_model.config.to_dict())


@pytest.fixture(scope="session")
def h14_folder(h14_model, clip_folder, tmp_path_factory):
    """In the format of PickScore: a folder of transformers, the end of a text named wrongly as in old files."""
    folder = tmp_path_factory.mktemp("h14")
    h14_model.save_pretrained(folder)
    for file in clip_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hps_folder(h14_model, clip_folder, tmp_path_factory):
    """In the format of HPSv2: an open_clip checkpoint with other things in it, a tokenizer beside it, no config."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("hps")
    tensors = open_clip_oracle.names({name: value.numpy() for name, value in h14_model.state_dict().items()})
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save({"epoch": 7, "name": "ViT-H-14", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((clip_folder / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def cosines(clip_folder):
    """By transformers and torch alone: (model, pixels [N,3,H,W], N prompts) -> cosines [N]."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)

    def run(model, pixels, prompts):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=torch.as_tensor(pixels), **tokens)
        return (out.logits_per_image.diag() / model.logit_scale.exp()).detach().numpy()

    return run


@pytest.fixture(scope="session")
def processed(clip_folder):
    """The folder's processor, by transformers: images u8 -> pixels [N,3,H,W]."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor.from_pretrained(clip_folder)
    return lambda images: processor(list(images), return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ]


@pytest.fixture(scope="session")
def images():
    """u8[5,72,60,3]: smooth colours with some noise, all different."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:72, 0:60] / 60
    waves = rng.uniform(1, 9, (5, 1, 1, 3, 2))
    smooth = np.sin(waves[..., 0] * y[None, :, :, None] + waves[..., 1] * x[None, :, :, None])
    return np.clip(127 + 110 * smooth + rng.normal(0, 12, (5, 72, 60, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """Context managers for rewards that need somebody at the other end: given the config, which they change, before the
    reward is made; ``meet`` then gets what was made."""
    import contextlib

    import http_tools

    from ddpo_jax.rewards import jpeg_compressibility

    @contextlib.contextmanager
    def remote(config):
        with http_tools.served(jpeg_compressibility.make(config)) as server:
            config.url = server.url
            yield lambda reward: None

    @contextlib.contextmanager
    def human(config):
        config.folder, config.port = str(tmp_path_factory.mktemp("human")), 0
        people = []
        try:
            yield lambda reward: people.append(http_tools.Rater(reward.address, http_tools.stars))
        finally:
            for person in people:
                person.stop()

    return {"remote": remote, "human": human}
