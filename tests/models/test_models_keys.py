"""Every tensor of the published SD 1.5 and SD 2.1 checkpoints has exactly one parameter of the right shape, and back.

The tables in third_party/keys come from the PyTorch modules (make_keys.py). Nothing here allocates a parameter.
"""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from ddpo_jax.models import keys, weights
from ddpo_jax.models.clip import CLIPText, CLIPTextConfig
from ddpo_jax.models.unet import UNet2DCondition, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig

KEYS = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "keys"
CLASSES = {
    "unet": (UNet2DCondition, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPText, CLIPTextConfig),
}
TABLES = [f"{model}_{part}" for model in ("sd15", "sd21") for part in CLASSES]
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def table(name):
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines())
    return {tensor: tuple(int(n) for n in shape.split(",")) for tensor, shape in rows}


@functools.cache
def abstract(name):
    cls, config = CLASSES[name.partition("_")[2]]
    return keys.abstract(cls, config.from_dict(json.loads((KEYS / f"{name}.json").read_text())))


def placeholder(shape):
    """An array of any size that occupies four bytes."""
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize("name", TABLES)
def test_every_upstream_tensor_has_one_parameter_and_back(name):
    upstream, ours = table(name), {path: tuple(leaf.shape) for path, leaf in keys.flat(abstract(name)).items()}
    # There: the strict merge accepts the whole table and gives every parameter its own shape.
    merged = weights.merge(ours, {key: placeholder(shape) for key, shape in upstream.items()}, keys.rule, where=name)
    assert {path: value.shape for path, value in merged.items()} == ours
    assert len(ours) == len(upstream)
    # Back: the names and shapes that we would write.
    assert keys.upstream_shapes(abstract(name)) == upstream


def test_parameter_counts_are_the_published_ones():
    counts = {name: sum(math.prod(shape) for shape in table(name).values()) for name in TABLES}
    assert counts == {
        "sd15_unet": 859_520_964,
        "sd15_vae": 83_653_863,
        "sd15_text_encoder": 123_060_480,
        "sd21_unet": 865_910_724,
        "sd21_vae": 83_653_863,
        "sd21_text_encoder": 340_387_840,
    }


def file_size(shapes):
    """Bytes of the safetensors file with these float32 tensors: alphabetical, header padded to eight bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        end = offset + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + offset


def old_vae(names):
    return {
        functools.reduce(
            lambda n, item: n.replace(f"attentions.0.{item[0]}.", f"attentions.0.{item[1]}."), OLD_VAE.items(), name
        ): value
        for name, value in names.items()
    }


def test_names_have_the_length_of_those_in_published_files():
    """A safetensors file has the size that its names and shapes give it; published sizes are independent of our tables.

    SD 1.5's VAE file has the old attention names. The other sizes are of SD-2.1-sized checkpoints saved by current
    versions. SD 1.5's other two files were written by an early serialiser that ordered tensors differently, which
    changes the number of digits of some offsets.
    """
    assert file_size(old_vae(table("sd15_vae"))) == weights.entry("sd15_vae").bytes
    assert file_size(table("sd21_vae")) == 334_643_268
    assert file_size(table("sd21_unet")) == 3_463_726_504
    assert file_size(table("sd21_text_encoder")) == 1_361_596_304
    assert abs(file_size(table("sd15_unet")) - weights.entry("sd15_unet").bytes) < 80


def test_older_names_are_understood():
    vae = table("sd15_vae")
    tensors = {name: placeholder(shape) for name, shape in old_vae(vae).items()}
    assert len(set(tensors) - set(vae)) == 16
    assert set(keys.canonical(tensors, vae)) == set(vae)
    text = table("sd15_text_encoder")
    bare = {name.removeprefix("text_model."): placeholder(shape) for name, shape in text.items()}
    assert set(keys.canonical(bare, text)) == set(text)
    with_ids = {name: placeholder(shape) for name, shape in text.items()}
    with_ids["text_model.embeddings.position_ids"] = np.arange(77)[None]
    assert set(keys.canonical(with_ids, text)) == set(text)


def test_rule_by_hand():
    assert keys.rule("a.conv.kernel", (3, 3, 4, 8)) == ("a.conv.weight", (2, 3, 1, 0))
    assert keys.rule("a.kernel", (4, 8)) == ("a.weight", (1, 0))
    assert keys.rule("norm.scale", (4,)) == ("norm.weight", (0,))
    assert keys.rule("e.embedding", (9, 4)) == ("e.weight", (0, 1))
    assert keys.rule("norm.bias", (4,)) == ("norm.bias", (0,))
    assert keys.rule("logit_scale", ()) == ("logit_scale", ())
    value = np.arange(24).reshape(2, 3, 4, 1)  # OIHW: 2 out, 3 in
    name, axes = keys.rule("k.kernel", (4, 1, 3, 2))
    np.testing.assert_array_equal(value.transpose(axes)[3, 0, 1, 1], value[1, 1, 3, 0])


def test_load_leaves_nothing_uninitialised_and_save_inverts_it():
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    rng = np.random.default_rng(0)
    shapes = keys.upstream_shapes(keys.abstract(CLIPText, config))
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = keys.load(CLIPText, config, tensors)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    back = keys.to_upstream(model)
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
    del tensors["text_model.final_layer_norm.bias"]
    with pytest.raises(ValueError, match="my encoder.*1 missing: text_model.final_layer_norm.bias"):
        keys.load(CLIPText, config, tensors, where="my encoder")


def test_tables_are_what_the_pytorch_modules_say():
    """Guards the tables against hand edits: the generator gives them again."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import runpy

    generator = runpy.run_path(str(pathlib.Path(__file__).with_name("make_keys.py")))
    for name in ("sd15_vae", "sd21_text_encoder"):
        config = json.loads((KEYS / f"{name}.json").read_text())
        part = name.partition("_")[2]
        assert generator["table"](part, generator["build"](part, config)) == table(name)
