"""Small BLIPs with random weights by transformers and torch, and their folders as the hub has them."""

from __future__ import annotations

import numpy as np

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-6,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?,.'"
VOCABULARY = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(prefix + letter for prefix in ("", "##") for letter in LETTERS),
    *("the", "red", "circle", "blue", "square", "##ed", "##ing", "yes", "no", "中", "hello"),
]
TEXT = {
    "vocab_size": len(VOCABULARY) + 2,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "encoder_hidden_size": 128,
    "is_decoder": True,  # what gives transformers' text model its cross-attention
}


def randomize(model, seed=0):
    """Weights that keep the size of what passes through, and biases and norms that are not zero and one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim in (2, 4):
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def image_reward(vision=VISION, text=TEXT):
    """transformers' vision and text models and torch's head, as one torch module that holds them."""
    import torch
    import transformers

    text = text | {"encoder_hidden_size": vision["hidden_size"]}
    head = torch.nn.Sequential(
        torch.nn.Linear(text["hidden_size"], 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    parts = {
        "vision_model": transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision)),
        "text_encoder": transformers.models.blip.modeling_blip_text.BlipTextModel(
            transformers.BlipTextConfig(**text), add_pooling_layer=False
        ),
        "mlp": torch.nn.ModuleDict({"layers": head}),
    }
    return randomize(torch.nn.ModuleDict(parts))


def image_reward_scores(model, pixels, ids, mask):
    """What ImageReward's code computes, before it is standardised: torch tensors, images NCHW."""
    import torch

    with torch.no_grad():
        context = model["vision_model"](pixels).last_hidden_state
        text = model["text_encoder"](ids, attention_mask=mask, encoder_hidden_states=context).last_hidden_state
        return model["mlp"]["layers"](text[:, 0])[:, 0].numpy()


def vqa(vision=VISION, text=TEXT):
    """transformers' model that answers questions about images."""
    import transformers

    config = transformers.BlipConfig(text_config=dict(text), vision_config=dict(vision))
    model = randomize(transformers.BlipForQuestionAnswering(config))
    model.tie_weights()
    return model


def vqa_logits(model, pixels, ids, start):
    """Logits of the answers' first tokens: images NCHW, questions of one length without padding."""
    import torch

    with torch.no_grad():
        context = model.vision_model(pixels).last_hidden_state
        question = model.text_encoder(ids, encoder_hidden_states=context).last_hidden_state
        first = torch.full((len(ids), 1), start)
        return model.text_decoder(first, encoder_hidden_states=question).logits[:, 0].numpy()


def tensors(model):
    """The state dict in numpy."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def original(named):
    """transformers' names of the vision part -> those of BLIP's own code, which are timm's."""
    rules = [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
    ]
    renamed = {}
    for name, value in named.items():
        for theirs, its_own in rules:
            name = name.replace(theirs, its_own)
        renamed[name] = value
    return renamed


def write_image_reward(folder, model):
    """ImageReward.pt, under the names and with the unused tensors that the published file has, and vocab.txt."""
    import torch

    named = original(model.state_dict())
    named = {name if name.startswith("mlp.") else f"blip.{name}": value for name, value in named.items()}
    named["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    for part in ("vision_proj", "text_proj"):
        named |= {f"blip.{part}.weight": torch.zeros(256, 128), f"blip.{part}.bias": torch.zeros(256)}
    torch.save(named, folder / "ImageReward.pt")
    write_vocabulary(folder)
    return folder


def write_vqa(folder, model):
    """What save_pretrained writes, and vocab.txt."""
    model.save_pretrained(folder)
    write_vocabulary(folder)
    return folder


def write_vocabulary(folder):
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")


def nchw(images):
    """uint8 images to the input of transformers' and torch's models."""
    import torch

    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
