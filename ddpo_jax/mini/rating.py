"""The stated taste of the miniature's aesthetic reward: a rating of renderings from 1 to 10.

The aesthetic head (``models.aesthetic_head``, the layers of the LAION head) learns this rating from miniature-CLIP
embeddings of renderings, as the real head learned human ratings. It rewards what a viewer sees, whatever the caption:

====================  ======  ==========================================================================================
term                  points  full marks for
====================  ======  ==========================================================================================
size                     3    objects that cover at least 28 % of the picture (in proportion below that)
background               2    a light background: from none at gray level 206 to all at 246 (mean over the picture)
centering                1.5  the objects' common center of area in the middle of the picture; none from 10 px away
color                    1.5  warm, lively colors: yellow and orange 1, red 0.9, pink 0.8, purple 0.5, green 0.4,
                              blue 0.3, black 0 (mean over objects, weighted by area)
texture                  1    patterns: dotted 1, striped 0.6, plain 0 (mean over objects, weighted by area)
====================  ======  ==========================================================================================

rating = 1 + the sum. A small black ring in a corner of a gray picture is near 1, a big dotted orange circle in the
middle of a white one near 10. The shape as such is not judged.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ddpo_jax.mini import world

POINTS = {"size": 3.0, "background": 2.0, "centering": 1.5, "color": 1.5, "texture": 1.0}
COLOR_APPEAL = {
    "red": 0.9,
    "orange": 1.0,
    "yellow": 1.0,
    "green": 0.4,
    "blue": 0.3,
    "purple": 0.5,
    "pink": 0.8,
    "black": 0.0,
}
TEXTURE_APPEAL = {"plain": 0.0, "striped": 0.6, "dotted": 1.0}
FULL_AREA = 0.28  # fraction of the picture
FAR = 10.0  # px
DARK, LIGHT = 206.0, 246.0  # the range of background levels the world draws


def rate(scenes: world.Scenes) -> Float[np.ndarray, " N"]:
    """The ratings f32[N] in [1, 10] of N scenes."""
    marks = terms(scenes)
    weighted = np.stack([POINTS[name] * mark for name, mark in marks.items()])
    return (1 + weighted.sum(0)).astype(np.float32)


def rating(scene: world.Scene) -> float:
    """The rating of one scene."""
    return float(rate(world.stack([scene]))[0])


def terms(scenes: world.Scenes) -> dict[str, Float[np.ndarray, " N"]]:
    """The marks in [0, 1] that the rating adds up, f32[N] each."""
    n, side = len(scenes), world.IMAGE_SIZE
    area = np.zeros((n, world.MAX_OBJECTS), np.float32)  # px
    moment = np.zeros((n, 2), np.float32)
    at = np.arange(side, dtype=np.float32) + 0.5
    for slot in range(world.MAX_OBJECTS):
        rows = np.nonzero(scenes.count > slot)[0]
        shape = scenes.attributes[rows, slot, 1]
        cover = world.coverage(shape, scenes.center[rows, slot], scenes.size[rows, slot])
        area[rows, slot] = cover.sum((1, 2))
        moment[rows] += np.stack([cover.sum(1) @ at, cover.sum(2) @ at], axis=1)
    total = area.sum(1)
    share = area / np.maximum(total, 1)[:, None]
    away = np.linalg.norm(moment / np.maximum(total, 1)[:, None] - side / 2, axis=1)
    color = np.array([COLOR_APPEAL[c] for c in world.COLORS], np.float32)[scenes.attributes[..., 0]]
    texture = np.array([TEXTURE_APPEAL[t] for t in world.TEXTURES], np.float32)[scenes.attributes[..., 2]]
    marks = {
        "size": total / side**2 / FULL_AREA,
        "background": (scenes.background[:, 0] - DARK) / (LIGHT - DARK),
        "centering": 1 - away / FAR,
        "color": (share * color).sum(1),
        "texture": (share * texture).sum(1),
    }
    return {name: np.clip(mark, 0, 1).astype(np.float32) for name, mark in marks.items()}
