"""open_clip for the tests: its tensor names written out by hand, and the package itself where it is installed."""

import importlib
import sys
from unittest import mock

import numpy as np
import pytest


def names(tensors):
    """A transformers CLIP state dict (numpy) -> the same CLIP as open_clip names and lays it out."""
    out = {
        "logit_scale": tensors["logit_scale"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
        "visual.proj": tensors["visual_projection.weight"].T,
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for theirs, root in (("", "text_model"), ("visual.", "vision_model")):
        layers = {int(name.split(".")[3]) for name in tensors if name.startswith(f"{root}.encoder.layers.")}
        for i in layers:
            block, layer = f"{theirs}transformer.resblocks.{i}", f"{root}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = [tensors[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = np.concatenate(parts)
                out[f"{block}.attn.out_proj.{kind}"] = tensors[f"{layer}.self_attn.out_proj.{kind}"]
                out[f"{block}.mlp.c_fc.{kind}"] = tensors[f"{layer}.mlp.fc1.{kind}"]
                out[f"{block}.mlp.c_proj.{kind}"] = tensors[f"{layer}.mlp.fc2.{kind}"]
            norms[f"{block}.ln_1"], norms[f"{block}.ln_2"] = f"{layer}.layer_norm1", f"{layer}.layer_norm2"
    for theirs, ours in norms.items():
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    return out


def package():
    """The package, or a skip. Its networks need nothing of torchvision or ftfy, but it imports them."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip_torch is not installed: pip install --no-deps open_clip_torch")
    importlib.import_module(
        "transformers"
    )  # asks first whether there is a torchvision; the CPU build of torch has none
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    names = [f"torchvision{part}" for part in parts] + ["ftfy"]
    stubs = {name: mock.MagicMock() for name in names if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("open_clip")
    finally:  # whoever else looks for these must not find them
        for name in stubs:
            del sys.modules[name]
