"""CLIP: the text encoder of Stable Diffusion, and both towers for rewards (Radford et al. 2021, arXiv:2103.00020).

`config` says what a CLIP looks like, `towers` is the network, `names` reads open_clip's tensor names.
"""

from ddpo_jax.models.clip.config import B32, H14, L14, LEGACY_EOS_TOKEN_ID, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ddpo_jax.models.clip.towers import CLIP, CLIPText, CLIPVisionProjected, normalize

__all__ = [
    "B32",
    "CLIP",
    "CLIPConfig",
    "CLIPText",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "CLIPVisionProjected",
    "H14",
    "L14",
    "LEGACY_EOS_TOKEN_ID",
    "normalize",
]
