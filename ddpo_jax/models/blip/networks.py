"""The two BLIP networks that score images: ImageReward, and visual question answering."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.models.aesthetic_head import AestheticHead, AestheticHeadConfig
from ddpo_jax.models.blip.text import BlipDecoder, BlipText, BlipTextConfig
from ddpo_jax.models.blip.vision import BlipVision, BlipVisionConfig


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Sizes of the image part and of the text part; ``text.context_size`` is the width of the image part."""

    vision: BlipVisionConfig = BlipVisionConfig()
    text: BlipTextConfig = BlipTextConfig()


IMAGE_REWARD = BlipConfig(
    BlipVisionConfig(
        image_size=224, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    BlipTextConfig(context_size=1024),
)  # ViT-L/16 at 224 pixels
VQA = BlipConfig()  # ViT-B/16 at 480 pixels


class ImageReward(nnx.Module):
    """How well an image shows a text and pleases people (Xu et al. 2023, arXiv:2304.05977), not yet standardised.

    The text reads the image; its first token goes through five linear layers, those of the LAION aesthetic head.
    """

    def __init__(self, config: BlipConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.vision_model = BlipVision(config.vision, dtype=dtype, rngs=rngs)
        self.text_encoder = BlipText(config.text, dtype=dtype, rngs=rngs)
        self.mlp = AestheticHead(AestheticHeadConfig(embed_dim=config.text.hidden_size), rngs=rngs)

    def __call__(
        self, images: Float[Array, "B H W 3"], ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> Float[Array, " B"]:
        """Scores of normalised images with one text each; ``mask`` is false where the text is padding."""
        tokens = self.text_encoder(ids, mask, self.vision_model(images))
        return self.mlp(tokens[:, 0].astype(jnp.float32))


class VisualQuestionAnswering(nnx.Module):
    """Answers to questions about images; parameters as those of transformers' `BlipForQuestionAnswering`."""

    def __init__(self, config: BlipConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.vision_model = BlipVision(config.vision, dtype=dtype, rngs=rngs)
        self.text_encoder = BlipText(config.text, dtype=dtype, rngs=rngs)
        answer = dataclasses.replace(config.text, context_size=config.text.hidden_size)
        self.text_decoder = BlipDecoder(answer, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        ids: Int[Array, "B Q L"],
        mask: Bool[Array, "B Q L"],
        start: int,
    ) -> Float[Array, "B Q V"]:
        """Logits of the first token of the answer to each of the Q questions about each image.

        Args:
          images: normalised.
          ids: of the questions.
          mask: false where a question is padding.
          start: id of the token that begins every answer.
        """
        context = self.vision_model(images)

        def answer(ids: Array, mask: Array) -> Array:
            question = self.text_encoder(ids, mask, context)
            return self.text_decoder(jnp.full((len(ids), 1), start), question, mask)[:, 0]

        # Mapped over the questions, not run on copies of the image: what an image's tokens give is computed once.
        return jax.vmap(answer, in_axes=1, out_axes=1)(ids, mask)
