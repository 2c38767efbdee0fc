"""The little world: captioned 32x32 scenes of colored, textured shapes, rendered in numpy from a random generator.

``mini.grammar`` says what can be drawn; its names are re-exported here.

Geometry: pixel (row i, column j) covers [j, j+1) x [i, i+1); centers are (x, y) in pixels with y pointing down; a
size is the full extent of the object in pixels. Patterns have a period of 4 px and are anchored to the image, not to
the object, so that every 4x4 patch of the autoencoder sees the same pattern.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ddpo_jax.mini.grammar import (  # noqa: F401  (world is the one import its users need)
    CATEGORIES,
    COLORS,
    HELD_OUT,
    KINDS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SPLITS,
    TEXTURES,
    LargePrompts,
    Spec,
    Thing,
    describe,
    is_novel,
    large_prompts,
    novel_prompts,
    parse,
    prompts,
    singular_and_plural,
    training_prompts,
)

IMAGE_SIZE = 32
MAX_OBJECTS = 4
PATTERN_PERIOD = 4

# Main and second tone of every color, RGB. The second tone carries the pattern: clearly lighter or darker, same name.
TONES = np.array(
    [
        [(226, 58, 58), (138, 14, 30)],  # red
        [(247, 140, 38), (178, 76, 6)],  # orange
        [(250, 208, 52), (186, 138, 10)],  # yellow
        [(52, 168, 83), (16, 92, 44)],  # green
        [(56, 112, 232), (16, 44, 132)],  # blue
        [(140, 72, 206), (74, 24, 122)],  # purple
        [(248, 146, 196), (208, 66, 138)],  # pink
        [(40, 42, 50), (132, 136, 148)],  # black
    ],
    np.float32,
)

# Direction of the first object seen from the second, per relation, in (x, y).
DIRECTIONS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)

SINGLE_SIZE, RELATION_SIZE, NUMBER_SIZE = (12.0, 20.0), (9.5, 13.0), (8.0, 11.0)
_KIND_PROBABILITIES = (0.45, 0.3, 0.25)
_MARGIN = 1.0  # px kept free between an object and the border
_GAP = 1.5  # px kept free between two objects


@dataclasses.dataclass(frozen=True)
class Object:
    """One drawn object: what it is, its center (x, y) and its full extent in pixels."""

    color: str
    shape: str
    texture: str
    center: tuple[float, float]
    size: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture: its caption's content, the drawn objects, and the background.

    ``background`` = (gray level 0-255, warmth, slope in x, slope in y): warmth is added to red and taken from blue,
    slopes are gray levels from one border to the other.
    """

    spec: Spec
    objects: tuple[Object, ...]
    background: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N scenes as arrays, so that a batch is drawn without a Python loop. Slots beyond ``count`` are meaningless.

    Indices point into COLORS, SHAPES, TEXTURES, KINDS and RELATIONS (-1 = no relation).
    """

    kind: np.ndarray  # i64[N]
    relation: np.ndarray  # i64[N]
    count: np.ndarray  # i64[N]
    attributes: np.ndarray  # i64[N, 4, 3] color, shape, texture
    center: np.ndarray  # f32[N, 4, 2] x, y in pixels
    size: np.ndarray  # f32[N, 4] pixels
    background: np.ndarray  # f32[N, 4], see Scene

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: int) -> Scene:
        things = [_thing(row) for row in self.attributes[index, : self.count[index]]]
        relation = int(self.relation[index])
        spec = Spec(
            tuple(things) if relation >= 0 else (things[0],),
            RELATIONS[relation] if relation >= 0 else None,
            len(things) if relation < 0 else 1,
        )
        objects = tuple(
            Object(t.color, t.shape, t.texture, (float(c[0]), float(c[1])), float(s))
            for t, c, s in zip(things, self.center[index], self.size[index], strict=False)
        )
        level, warmth, slope_x, slope_y = self.background[index].tolist()
        return Scene(spec, objects, (level, warmth, slope_x, slope_y))


def stack(scenes: Sequence[Scene]) -> Scenes:
    """Scenes as arrays."""
    n = len(scenes)
    attributes = np.zeros((n, MAX_OBJECTS, 3), np.int64)
    center, size = np.zeros((n, MAX_OBJECTS, 2), np.float32), np.ones((n, MAX_OBJECTS), np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.objects):
            attributes[i, j] = COLORS.index(thing.color), SHAPES.index(thing.shape), TEXTURES.index(thing.texture)
            center[i, j], size[i, j] = thing.center, thing.size
    return Scenes(
        kind=np.array([KINDS.index(s.spec.kind) for s in scenes], np.int64),
        relation=np.array([RELATIONS.index(s.spec.relation) if s.spec.relation else -1 for s in scenes], np.int64),
        count=np.array([len(s.objects) for s in scenes], np.int64),
        attributes=attributes,
        center=center,
        size=size,
        background=np.array([s.background for s in scenes], np.float32).reshape(n, 4),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Drawing scenes at random
# ----------------------------------------------------------------------------------------------------------------------


def sample_scenes(rng: np.random.Generator, n: int) -> Scenes:
    """N random scenes: 45 % single objects, 30 % relations, 25 % numbers; attributes uniform."""
    kind = rng.choice(len(KINDS), size=n, p=_KIND_PROBABILITIES)
    relation = np.where(kind == 1, rng.integers(len(RELATIONS), size=n), -1)
    count = np.where(kind == 0, 1, np.where(kind == 1, 2, rng.integers(2, 5, size=n)))
    code = rng.integers(len(_ALL), size=n)
    # The other object of a relation: any of the 191 different ones.
    other = (code + rng.integers(1, len(_ALL), size=n)) % len(_ALL)
    attributes = np.repeat(_ALL[code][:, None], MAX_OBJECTS, axis=1)
    attributes[:, 1] = np.where((kind == 1)[:, None], _ALL[other], attributes[:, 1])
    return _place(rng, kind, relation, count, attributes)


def scenes_for(specs: Sequence[Spec], rng: np.random.Generator) -> Scenes:
    """One random scene per spec: positions, sizes and background vary, the content does not."""
    kind = np.array([KINDS.index(spec.kind) for spec in specs], np.int64)
    relation = np.array([RELATIONS.index(spec.relation) if spec.relation else -1 for spec in specs], np.int64)
    count = np.array([2 if spec.relation else spec.number for spec in specs], np.int64)
    attributes = np.zeros((len(specs), MAX_OBJECTS, 3), np.int64)
    for i, spec in enumerate(specs):
        for j in range(MAX_OBJECTS):
            thing = spec.things[min(j, len(spec.things) - 1)]
            attributes[i, j] = COLORS.index(thing.color), SHAPES.index(thing.shape), TEXTURES.index(thing.texture)
    return _place(rng, kind, relation, count, attributes)


def batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """N random pictures u8[n,32,32,3] and their captions."""
    scenes = sample_scenes(rng, n)
    return render_all(scenes), captions(scenes)


def _place(
    rng: np.random.Generator, kind: np.ndarray, relation: np.ndarray, count: np.ndarray, attributes: np.ndarray
) -> Scenes:
    """Positions, sizes and backgrounds for given contents. Every branch is drawn for every row, then selected."""
    n, span = len(kind), float(IMAGE_SIZE)

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        return rng.random(shape, dtype=np.float32)

    def between(low: np.ndarray | float, high: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(low + (high - low) * uniform(shape))

    # Single: anywhere inside.
    size_single = between(*SINGLE_SIZE, (n, 1))
    reach = size_single / 2 + _MARGIN
    center_single = between(reach[:, :, None], span - reach[:, :, None], (n, 1, 2))

    # Relation: `low` and `high` are the objects with the smaller and larger coordinate along the axis of the relation.
    size = between(*RELATION_SIZE, (n, 2))
    low_reach, high_reach = size[:, 0] / 2 + _MARGIN, size[:, 1] / 2 + _MARGIN
    distance = between(size.mean(1) + _GAP, span - low_reach - high_reach, (n,))
    low = between(low_reach, span - high_reach - distance, (n,))
    across = between(size / 2 + _MARGIN, span - size / 2 - _MARGIN, (n, 2))
    shift = across[:, 1] - across[:, 0]  # kept below half the distance, so that the relation is never ambiguous
    excess = (shift - np.clip(shift, -distance / 2, distance / 2))[:, None] / 2
    across = np.clip(across + excess * np.array([1, -1], np.float32), size / 2 + _MARGIN, span - size / 2 - _MARGIN)
    along = np.stack([low, low + distance], axis=1)
    first_is_high = (relation % 2 == 1)[:, None]
    size_relation = np.where(first_is_high, size[:, ::-1], size)
    along, across = np.where(first_is_high, along[:, ::-1], along), np.where(first_is_high, across[:, ::-1], across)
    horizontal = (relation < 2)[:, None, None]
    center_relation = np.where(horizontal, np.stack([along, across], -1), np.stack([across, along], -1))

    # Number: one object in each of `count` of the four quarters of the image, so none overlap.
    size_number = np.repeat(between(*NUMBER_SIZE, (n, 1)), MAX_OBJECTS, axis=1)
    quarter = np.argsort(uniform((n, MAX_OBJECTS)), axis=1)
    corner = np.stack([quarter % 2, quarter // 2], axis=-1).astype(np.float32) * span / 2
    reach = (size_number / 2 + _GAP / 2)[:, :, None]
    center_number = corner + between(reach, span / 2 - reach, (n, MAX_OBJECTS, 2))

    is_single, is_relation = kind == 0, kind == 1
    sizes, centers = size_number, center_number
    sizes[is_single, :1], centers[is_single, :1] = size_single[is_single], center_single[is_single]
    sizes[is_relation, :2], centers[is_relation, :2] = size_relation[is_relation], center_relation[is_relation]
    background = np.stack(
        [between(206, 246, (n,)), between(-2, 8, (n,)), between(-14, 14, (n,)), between(-14, 14, (n,))], axis=1
    )
    return Scenes(kind, relation, count, attributes, centers, sizes, background)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------------------


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, u8[32,32,3]."""
    return render_all(stack([scene]))[0]


def render_all(scenes: Scenes) -> np.ndarray:
    """The pictures of N scenes, u8[N,32,32,3], anti-aliased by the signed distance to each outline."""
    at = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    level, warmth, slope_x, slope_y = (scenes.background[:, i, None, None] for i in range(4))
    ramp = at / IMAGE_SIZE - 0.5
    gray = level + slope_x * ramp[None, None, :] + slope_y * ramp[None, :, None]
    images = np.stack([gray + warmth, gray, gray - warmth], axis=-1)
    patterned = _patterned_tones()
    for slot in range(MAX_OBJECTS):
        rows = np.nonzero(scenes.count > slot)[0]
        color, shape, texture = scenes.attributes[rows, slot].T
        cover = coverage(shape, scenes.center[rows, slot], scenes.size[rows, slot])[..., None]
        below = images[rows]
        images[rows] = below + cover * (patterned[color, texture] - below)
    return np.clip(images + 0.5, 0, 255).astype(np.uint8)


def coverage(shape: np.ndarray, center: np.ndarray, size: np.ndarray) -> np.ndarray:
    """How much of each pixel an object covers, f32[M,32,32] in [0,1], for M shapes, centers [M,2] and sizes [M]."""
    table, resolution, extent = _distance_table()
    at = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    half = (size / 2).astype(np.float32)[:, None]
    scale = (resolution - 1) / (2 * extent)
    column, row = (
        np.clip(((at - center[:, i, None]) / half + extent) * scale + 0.5, 0, resolution - 1).astype(np.int32)
        for i in range(2)
    )
    row += (shape * resolution).astype(np.int32)[:, None]
    distance = table.take(row[:, :, None] * resolution + column[:, None, :])
    return np.clip(0.5 - distance * half[:, :, None], 0, 1)


@functools.cache
def _patterned_tones() -> np.ndarray:
    """RGB of every color under every texture at every pixel, f32[8,3,32,32,3]."""
    y, x = np.indices((IMAGE_SIZE, IMAGE_SIZE)) % PATTERN_PERIOD
    second = np.stack([np.zeros_like(x), y >= 2, (x >= 2) & (y >= 2)]).astype(np.float32)[None, ..., None]
    main, other = TONES[:, 0][:, None, None, None], TONES[:, 1][:, None, None, None]
    return (main + second * (other - main)).astype(np.float32)


@functools.cache
def _distance_table() -> tuple[np.ndarray, int, float]:
    """Signed distance (units of half the size, negative inside) to every outline on a fine grid over [-e, e]^2."""
    resolution, extent = 257, 1.3  # 0.01 of the half size: below a tenth of a pixel for every object drawn
    axis = np.linspace(-extent, extent, resolution)
    x, y = np.meshgrid(axis, axis)

    def disk(radius: float, cx: float = 0.0, cy: float = 0.0) -> np.ndarray:
        return np.hypot(x - cx, y - cy) - radius

    angle = np.pi * np.arange(10) / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.12, 0.5)
    arm = 0.36
    outlines = {
        "circle": disk(0.96),
        "square": _polygon(x, y, [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]),
        "triangle": _polygon(x, y, [(0, -1.0), (1.02, 0.84), (-1.02, 0.84)]),
        "diamond": _polygon(x, y, [(0, -1.08), (0.82, 0), (0, 1.08), (-0.82, 0)]),
        "cross": np.minimum(_box(x, y, 0.98, arm), _box(x, y, arm, 0.98)),
        "ring": np.abs(disk(0.74)) - 0.26,
        "star": _polygon(x, y, np.stack([radius * np.sin(angle), 0.08 - radius * np.cos(angle)], axis=1)),
        "crescent": np.maximum(disk(1.0), -disk(0.86, 0.52, -0.18)),
    }
    table = np.stack([outlines[shape] for shape in SHAPES]).astype(np.float32)
    return table.reshape(-1), resolution, extent


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to a centered rectangle."""
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon: distance to the nearest edge, sign by crossing number."""
    nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    corners = np.asarray(corners, np.float64)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * ex, y - ay - t * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


def caption(scene: Scene) -> str:
    """The caption of a scene."""
    return describe(scene.spec)


def captions(scenes: Scenes) -> list[str]:
    """The captions of N scenes."""
    singular, plural = singular_and_plural()
    code = (scenes.attributes[..., 0] * len(SHAPES) + scenes.attributes[..., 1]) * len(TEXTURES)
    code = (code + scenes.attributes[..., 2]).tolist()
    out = []
    for kind, relation, count, c in zip(
        scenes.kind.tolist(), scenes.relation.tolist(), scenes.count.tolist(), code, strict=True
    ):
        if kind == 0:
            out.append(singular[c[0]])
        elif kind == 1:
            out.append(f"{singular[c[0]]} {RELATIONS[relation]} {singular[c[1]]}")
        else:
            out.append(f"{NUMBERS[count - 1]} {plural[c[0]]}")
    return out


# All 192 (color, shape, texture) triples in lexicographic order.
_ALL = np.array(np.unravel_index(np.arange(192), (len(COLORS), len(SHAPES), len(TEXTURES)))).T


def _thing(indices: np.ndarray) -> Thing:
    return Thing(COLORS[indices[0]], SHAPES[indices[1]], TEXTURES[indices[2]])
