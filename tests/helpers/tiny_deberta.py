"""A DeBERTa with random weights and a vocabulary of its own, as transformers writes one."""

import json

TEXTS = ["the image contains a red cat", "two striped green dogs", "a photo of the sky, blue as ever"]


def folder(path, layers=3, max_relative_positions=-1, head=False):
    """Writes a folder of transformers; ``head`` adds the classifier that the published model has. Returns the model."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    core = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    core.train_from_iterator(TEXTS, vocab_size=300, min_frequency=1, special_tokens=specials, show_progress=False)
    path.mkdir(exist_ok=True)
    core.save_model(str(path))
    config = transformers.DebertaConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        max_relative_positions=max_relative_positions,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type="c2p|p2c",
        type_vocab_size=0,
    )
    kind = transformers.DebertaForSequenceClassification if head else transformers.DebertaModel
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so large that every term shows, and tokens stay apart
            scale = 0.125 if parameter.ndim == 1 else (0.5 if "dense" in name else 2) * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape) + ("LayerNorm.weight" in name))
    model.save_pretrained(path)
    return model


def without(path, *names):
    """Removes keys of the folder's config.json."""
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key not in names}))
