"""How much of a caption a detected picture shows: rules on detections, in the manner of T2I-CompBench.

A picture is up to K detections i, each with a presence p_i in [0, 1], probabilities of every color, shape and texture,
and a center. For a caption that asks for thing a, write c_i, s_i, t_i for the probabilities that detection i has a's
color, shape and texture, m_i = (c_i + s_i + t_i) / 3 for the match, and P = sum_i p_i for the expected number of things
in the picture. All parts are in [0, 1] and smooth almost everywhere in the detector's outputs.

* one object, and numbers: ``color`` = sum_i p_i c_i / max(1, P), likewise ``shape`` and ``texture``. What else is in
  the picture counts: two things of which one is right give a half, an empty picture gives nothing.
* relation "a R b": i and j != i are the detections read as a and b (below);
  ``color`` = (p_i c_i^a + p_j c_j^b) / max(2, P), likewise ``shape`` and ``texture``;
  ``spatial`` = p_i m_i^a * p_j m_j^b * sigmoid((u - |v|) / 1.5 px), where u is how far a lies from b in the direction R
  and v how far across it. So u must exceed |v|: the relation must be the dominant one.
  Of all ordered pairs the one with the largest p_i m_i^a + p_j m_j^b + spatial is read: the most favourable reading.
* number n: ``numeracy`` = 1/2 E[max(0, 1 - |C - n| / n)] + 1/2 Prob(C = n), where the count C is the sum of independent
  Bernoulli(p_i): half for being close, half for being exact. It counts things of every kind; ``color``, ``shape`` and
  ``texture`` say whether they are the right ones.

The total is the mean of the parts that apply; the others are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.mini import world

PARTS = world.CATEGORIES
SOFTNESS = 1.5  # px: a relation is judged right with probability 0.88 when it dominates by 3 px


class Detections(NamedTuple):
    """What was found in N pictures; a slot without a detection has presence 0."""

    presence: Float[Any, "N K"]
    color: Float[Any, "N K 8"]  # probabilities, in the order of world.COLORS
    shape: Float[Any, "N K 8"]
    texture: Float[Any, "N K 3"]
    center: Float[Any, "N K 2"]  # x, y in pixels


class Questions(NamedTuple):
    """What N captions ask for; ``things`` holds (color, shape, texture) indices, twice the same without a relation."""

    things: Int[Any, "N 2 3"]
    relation: Int[Any, " N"]  # -1 without
    number: Int[Any, " N"]  # 1 for one object and for relations


def questions(prompts: Sequence[str]) -> Questions:
    """Reads captions.

    Raises:
      InputError: a caption is outside the grammar of the world.
    """
    specs = [world.parse(prompt) for prompt in prompts]
    things = [
        [
            (world.COLORS.index(t.color), world.SHAPES.index(t.shape), world.TEXTURES.index(t.texture))
            for t in (spec.things[0], spec.things[-1])
        ]
        for spec in specs
    ]
    relation = [world.RELATIONS.index(spec.relation) if spec.relation else -1 for spec in specs]
    return Questions(
        np.array(things, np.int32).reshape(-1, 2, 3),
        np.array(relation, np.int32),
        np.array([spec.number for spec in specs], np.int32),
    )


def score(found: Detections, asked: Questions) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """The total and its parts, each in [0, 1]; a part that does not apply is NaN. See the module docstring.

    Args:
      found: detections of N pictures.
      asked: the questions of their N captions.
    """
    presence = found.presence
    expected = presence.sum(1)
    is_relation = asked.relation >= 0

    def probability(table: Array, index: Array) -> Array:  # [N, K, V], [N, 2] -> [N, 2, K]
        return jnp.take_along_axis(jnp.swapaxes(table, 1, 2), index[:, :, None], axis=1)

    tables = {"color": found.color, "shape": found.shape, "texture": found.texture}
    right = {name: probability(table, asked.things[:, :, k]) for k, (name, table) in enumerate(tables.items())}
    match = presence[:, None] * sum(right.values()) / 3  # [N, 2, K]
    reading, spatial = _read_pair(found, match, asked.relation)

    parts = {}
    for name, r in right.items():
        held = presence[:, None] * r  # [N, 2, K]
        alone = held[:, 0].sum(1) / jnp.maximum(1, expected)
        pair = (held[:, 0, :, None] + held[:, 1, None, :]).reshape(len(held), -1)
        together = jnp.take_along_axis(pair, reading[:, None], axis=1)[:, 0] / jnp.maximum(2, expected)
        parts[name] = jnp.where(is_relation, together, alone)
    parts["spatial"] = jnp.where(is_relation, spatial, jnp.nan)
    parts["numeracy"] = jnp.where(asked.number > 1, numeracy(presence, asked.number), jnp.nan)
    parts = {name: jnp.clip(part, 0, 1) for name, part in parts.items()}
    return jnp.nanmean(jnp.stack(list(parts.values())), axis=0), parts


def _read_pair(found: Detections, match: Array, relation: Array) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The ordered pair of detections (as i * K + j) read as the two things of a relation, and its spatial part."""
    n, k = found.presence.shape
    offset = found.center[:, :, None] - found.center[:, None, :]  # [N, i, j, 2]: i seen from j
    direction = jnp.asarray(world.DIRECTIONS)[jnp.maximum(relation, 0)][:, None, None]
    along = (offset * direction).sum(-1)
    across = jnp.abs((offset * direction[..., ::-1]).sum(-1))
    spatial = match[:, 0, :, None] * match[:, 1, None, :] * jax.nn.sigmoid((along - across) / SOFTNESS)
    favour = match[:, 0, :, None] + match[:, 1, None, :] + spatial
    favour = jnp.where(jnp.eye(k, dtype=bool), -1.0, favour).reshape(n, k * k)
    reading = favour.argmax(1)
    return reading, jnp.take_along_axis(spatial.reshape(n, k * k), reading[:, None], axis=1)[:, 0]


def numeracy(presence: Float[Array, "N K"], number: Int[Array, " N"]) -> Float[Array, " N"]:
    """Half for being close to ``number``, half for being exact, in expectation over independent presences."""
    k = presence.shape[1]
    count = jnp.zeros((len(presence), k + 1)).at[:, 0].set(1.0)  # Poisson binomial, one detection after the other
    for i in range(k):
        p = presence[:, i, None]
        count = count * (1 - p) + jnp.pad(count[:, :-1], ((0, 0), (1, 0))) * p
    distance = jnp.abs(jnp.arange(k + 1) - number[:, None])
    close = jnp.maximum(0, 1 - distance / number[:, None])
    return (count * (close + (distance == 0)) / 2).sum(1)


def answers(
    found: Detections, scenes: world.Scenes
) -> dict[str, tuple[Bool[np.ndarray, " M"], Bool[np.ndarray, " M"]]]:
    """Hard decisions against the truth, for measuring a detector: (is right, applies) per part.

    Every drawn object is looked for at the nearest detection with presence above a half, at most 4 px away; a missing
    object is wrong in everything. ``color``, ``shape``, ``texture`` have one entry per object slot (N * 4);
    ``spatial`` (the dominant direction between both detections) and ``numeracy`` (the count) one per picture.
    """
    found = Detections(*(np.asarray(x) for x in found))
    n, drawn = len(scenes), np.arange(world.MAX_OBJECTS) < scenes.count[:, None]
    seen = found.presence > 0.5
    distance = np.linalg.norm(scenes.center[:, :, None] - found.center[:, None], axis=-1)
    distance = np.where(seen[:, None], distance, np.inf)
    nearest = distance.argmin(2)
    hit = distance.min(2) < 4
    rows = np.arange(n)[:, None]
    result = {}
    for k, name in enumerate(("color", "shape", "texture")):
        said = getattr(found, name)[rows, nearest].argmax(-1)
        result[name] = ((said == scenes.attributes[..., k]) & hit).reshape(-1), drawn.reshape(-1)
    center = found.center[rows, nearest]
    offset = center[:, 0] - center[:, 1]
    said = np.where(
        np.abs(offset[:, 0]) > np.abs(offset[:, 1]), np.where(offset[:, 0] < 0, 0, 1), np.where(offset[:, 1] < 0, 2, 3)
    )
    result["spatial"] = (said == scenes.relation) & hit[:, :2].all(1), scenes.kind == 1
    result["numeracy"] = seen.sum(1) == scenes.count, scenes.kind != 1
    return result
