"""DeBERTa against transformers on random weights: hidden states, padding, clipped distances, tokens, folders."""

import json

import jax
import numpy as np
import pytest
import tiny_deberta
from flax import nnx

from ddpo_jax.models import deberta

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SENTENCES = [
    "the image contains a red cat",
    "two dogs",
    " leading space, naïve café — 日本 🎨",
    "UPPER lower 1234\nnew line",
]


def hidden_states(model, ids, pad_id):
    """Of every layer, by transformers."""
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids != pad_id).long(), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states]


def run(model, ids):
    """The model's hidden states, compiled."""
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids))


@pytest.mark.parametrize("reach", [-1, 4])  # -1: as far as the text is long; 4: distances are clipped
def test_every_layer_is_that_of_transformers(tmp_path, reach):
    oracle = tiny_deberta.folder(tmp_path / "model", max_relative_positions=reach)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 200, (3, 12)).astype(np.int32)
    ids[0, 7:] = ids[1, 11:] = 0
    expected = hidden_states(oracle, ids, 0)
    real = ids != 0
    for layer in (1, 2, 3):
        model, _ = deberta.load(tmp_path / "model", layer)
        found = run(model, ids)
        assert np.abs(expected[layer][real]).mean() > 0.3
        np.testing.assert_allclose(found[real], expected[layer][real], atol=1e-4, rtol=0)
    far = run(model, ids[:, ::-1].copy())[:, ::-1]
    assert np.abs(far[real] - found[real]).max() > 0.1  # the order of the tokens matters


def test_padding_reaches_nothing(tmp_path):
    tiny_deberta.folder(tmp_path / "model")
    model, tokenizer = deberta.load(tmp_path / "model", 2)
    short, long = tokenizer(["two dogs"]), tokenizer(["two dogs"], 32)
    assert long.shape == (1, 32) and (long[0, short.shape[1] :] == tokenizer.pad_id).all()
    found = run(model, long)[:, : short.shape[1]]
    np.testing.assert_allclose(found, run(model, short), atol=2e-6)


def test_tokens_are_those_of_transformers(tmp_path):
    tiny_deberta.folder(tmp_path / "model")
    oracle = transformers.DebertaTokenizer.from_pretrained(tmp_path / "model")
    expected = oracle(SENTENCES)["input_ids"]
    for source in ("vocab.json", "tokenizer.json"):
        tokenizer = deberta.Tokenizer.from_folder(tmp_path / "model")
        ids = tokenizer(SENTENCES)
        assert [row[row != tokenizer.pad_id].tolist() for row in ids] == expected, source
        assert tokenizer.special == [oracle.cls_token_id, oracle.sep_token_id]
        assert tokenizer.pad_id == oracle.pad_token_id == 0
        oracle.save_pretrained(tmp_path / "model")  # transformers 5 writes tokenizer.json
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    endless = tokenizer(["cat " * 600])
    assert endless.shape == (1, 512) and endless[0, -1] == tokenizer.special[1]
    assert endless[0].tolist() == oracle(["cat " * 600], truncation=True, max_length=512)["input_ids"][0]


def test_the_published_layout(tmp_path):
    """A classifier on top, names with ``deberta.``, absolute positions that the model does not use, pickled."""
    oracle = tiny_deberta.folder(tmp_path / "model", head=True)
    tensors = oracle.state_dict()
    tensors["deberta.embeddings.position_embeddings.weight"] = torch.zeros(64, 32)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    model, _ = deberta.load(tmp_path / "model", 2)
    ids = np.arange(5, 14, dtype=np.int32)[None]
    expected = hidden_states(oracle.deberta, ids, 0)[2]
    np.testing.assert_allclose(run(model, ids), expected, atol=1e-4, rtol=0)


def test_sizes_of_the_published_model():
    """40 layers: 3 + 1 + 2 maps of 1024 x 1024, 2 of 1024 x 4096, biases and norms; 50265 words; 1024 distances."""
    from ddpo_jax.models import keys

    config = deberta.DebertaConfig(num_hidden_layers=40)
    shapes = keys.upstream_shapes(keys.abstract(deberta.Deberta, config))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    d, f = 1024, 4096
    layer = 3 * d * d + 2 * d + d * d + (d * d + d) + (d * d + d) + 2 * d + (d * f + f) + (f * d + d) + 2 * d
    assert count == 40 * layer + 50265 * d + 2 * d + 1024 * d
    assert shapes["encoder.layer.39.attention.self.in_proj.weight"] == (3072, 1024)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"model_type": "deberta-v2"}, r"model_type = 'deberta-v2' is not supported; it must be 'deberta'"),
        ({"relative_attention": False}, r"relative_attention = False is not supported"),
        ({"position_biased_input": True}, r"position_biased_input = True is not supported"),
        ({"pos_att_type": ["c2p"]}, r"pos_att_type = \['c2p'\] is not supported; it must be c2p\|p2c"),
        ({"num_attention_heads": 5}, r"hidden_size = 32 must be a multiple of num_attention_heads = 5"),
        ({"vocab_size": 7}, r"word_embeddings"),
    ],
)
def test_folders_of_other_models(tmp_path, changes, why):
    tiny_deberta.folder(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=why):
        deberta.load(tmp_path / "model", 2)


def test_folders_that_lack_something(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json there; give the folder of microsoft/deberta-xlarge-mnli"):
        deberta.load(tmp_path, 1)
    path = tmp_path / "model"
    tiny_deberta.folder(path)
    with pytest.raises(ValueError, match=r"layer 4 was asked for; it has layers 1 to 3"):
        deberta.load(path, 4)
    (path / "vocab.json").rename(path / "words.json")
    with pytest.raises(ValueError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        deberta.load(path, 1)
    words = json.loads((path / "words.json").read_text())
    (path / "vocab.json").write_text(json.dumps({word: i for word, i in words.items() if word != "[SEP]"}))
    with pytest.raises(ValueError, match=r"the vocabulary has no \[SEP\]"):
        deberta.load(path, 1)
    tiny_deberta.without(path, "hidden_size", "relative_attention")
    with pytest.raises(ValueError, match=r"relative_attention = False is not supported"):
        deberta.load(path, 1)
