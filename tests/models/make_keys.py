"""Writes third_party/keys/*.tsv: the tensor names and shapes of the published Stable Diffusion checkpoints.

The names come from the PyTorch modules themselves, built without memory on the meta device from the configs beside
the tables (third_party/keys/*.json). Run from the repository root: `python tests/models/make_keys.py`.
"""

import json
import pathlib

import diffusers
import torch
import transformers

KEYS = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "keys"


def build(part: str, config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        if part == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        return {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part](**config)


def table(part: str, module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the module. transformers 5 drops a prefix that the published files have."""
    prefix = "text_model." if part == "text_encoder" else ""
    return {prefix + name.removeprefix(prefix): tuple(value.shape) for name, value in module.state_dict().items()}


def main() -> None:
    for path in sorted(KEYS.glob("*.json")):
        part = path.stem.partition("_")[2]
        rows = table(part, build(part, json.loads(path.read_text())))
        text = "".join(f"{name}\t{','.join(map(str, shape))}\n" for name, shape in rows.items())
        path.with_suffix(".tsv").write_text(text)
        print(f"{path.stem}: {len(rows)} tensors")


if __name__ == "__main__":
    main()
