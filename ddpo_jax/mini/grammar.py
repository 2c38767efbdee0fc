"""What the miniature's world can say: its words, its captions, and the prompt sets made of them.

Grammar (the categories of T2I-CompBench, arXiv:2307.06350, at miniature scale)::

    caption  = object | object relation object | number things
    object   = ("a" | "an") [texture] color shape          a red circle, a striped orange star
    things   = [texture] color plural                      two dotted blue rings
    relation = "left of" | "right of" | "above" | "below"
    number   = "two" | "three" | "four"

A plain surface has no adjective. The two objects of a relation differ in color, shape or texture, so a caption always
says which is which. ``parse`` is the exact inverse of ``describe``.

The split. Eight (color, shape) pairs, one per color and one per shape (``HELD_OUT``), never appear in a prompt of a
``train`` set, in no category, texture, relation or number. Every ``novel`` prompt contains one. The base model has seen
them (pre-training draws from the whole world), reinforcement learning has not: ``novel`` measures generalisation.

Sizes, train / novel: ``training_prompts`` 48 / ``novel_prompts`` 48; per category color 700 / 300, shape 700 / 300,
texture 112 / 16, spatial 700 / 300, numeracy 168 / 24; ``large_prompts`` 112 896.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from ddpo_jax.errors import InputError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "four")
KINDS = ("single", "relation", "number")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a caption says of one object."""

    color: str
    shape: str
    texture: str = "plain"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a caption says: ``things`` has one entry, or two when ``relation`` is set; ``number`` copies otherwise."""

    things: tuple[Thing, ...]
    relation: str | None = None
    number: int = 1

    @property
    def kind(self) -> str:
        """``"single"``, ``"relation"`` or ``"number"``."""
        return "relation" if self.relation else "number" if self.number > 1 else "single"


def describe(spec: Spec) -> str:
    """The caption of a spec."""
    if spec.kind == "number":
        return f"{NUMBERS[spec.number - 1]} {_phrase(spec.things[0], plural=True)}"
    first, *rest = [_with_article(thing) for thing in spec.things]
    return f"{first} {spec.relation} {rest[0]}" if rest else first


@functools.lru_cache(maxsize=65536)
def parse(caption: str) -> Spec:
    """The spec a caption describes; inverse of ``describe``.

    Raises:
      InputError: the caption is not a sentence of the grammar (see the module docstring).
    """
    words = caption.split(" ")
    if words[0] in NUMBERS[1:]:
        return Spec((_read(words[1:], caption, plural=True),), None, NUMBERS.index(words[0]) + 1)
    for relation in RELATIONS:
        first, middle, second = caption.partition(f" {relation} ")
        if middle:
            things = _read_with_article(first, caption), _read_with_article(second, caption)
            if things[0] == things[1]:
                raise _outside(caption, "the two objects of a relation must differ in color, shape or texture")
            return Spec(things, relation)
    return Spec((_read_with_article(caption, caption),))


@functools.cache
def singular_and_plural() -> tuple[list[str], list[str]]:
    """The 192 objects in (color, shape, texture) order, as ``a red circle`` and as ``red circles``."""
    things = [Thing(*t) for t in itertools.product(COLORS, SHAPES, TEXTURES)]
    return [_with_article(thing) for thing in things], [_phrase(thing, plural=True) for thing in things]


def _phrase(thing: Thing, plural: bool = False) -> str:
    texture = "" if thing.texture == "plain" else thing.texture + " "
    return f"{texture}{thing.color} {PLURALS[thing.shape] if plural else thing.shape}"


def _with_article(thing: Thing) -> str:
    phrase = _phrase(thing)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _read(words: Sequence[str], caption: str, plural: bool = False) -> Thing:
    words = list(words)
    texture = words.pop(0) if words and words[0] in TEXTURES[1:] else "plain"
    shapes = {PLURALS[shape]: shape for shape in SHAPES} if plural else {shape: shape for shape in SHAPES}
    if len(words) != 2 or words[0] not in COLORS or words[1] not in shapes:
        raise _outside(caption, f"not [texture] color {'plural shape' if plural else 'shape'}: {' '.join(words)!r}")
    return Thing(words[0], shapes[words[1]], texture)


def _read_with_article(text: str, caption: str) -> Thing:
    article, _, rest = text.partition(" ")
    thing = _read(rest.split(" "), caption)
    if text != _with_article(thing):
        raise _outside(caption, f"{article!r} should be {_with_article(thing).split(' ')[0]!r}")
    return thing


def _outside(caption: str, why: str) -> InputError:
    return InputError(
        f"prompt: received {caption!r}, which the miniature's world cannot draw ({why}); write it like "
        "'a striped red circle', 'two blue stars' or 'a red circle left of a dotted blue square'"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Prompt sets: deterministic, in a documented order
# ----------------------------------------------------------------------------------------------------------------------

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy")
SPLITS = ("train", "novel")
HELD_OUT = frozenset((color, SHAPES[(3 * i + 2) % len(SHAPES)]) for i, color in enumerate(COLORS))


def is_novel(spec: Spec) -> bool:
    """Whether a spec shows a held-out (color, shape) pair."""
    return any((thing.color, thing.shape) in HELD_OUT for thing in spec.things)


def training_prompts() -> list[str]:
    """The default set for reinforcement learning: 48 prompts, every color and every shape equally often.

    In order: 16 single objects (8 plain, 4 striped, 4 dotted), 16 relations of two plain objects of different color
    and shape (4 of each relation), 16 numbers (6 of two, 5 of three, 5 of four; half of them textured).
    """
    return _mixed(novel=False)


def novel_prompts() -> list[str]:
    """48 prompts of the same make as ``training_prompts``, each with a held-out (color, shape) pair."""
    return _mixed(novel=True)


def prompts(category: str, split: str = "train") -> list[str]:
    """The prompts that test one ability.

    * ``color``: two plain objects of one shape and two colors in a relation (does each get its color?)
    * ``shape``: two plain objects of one color and two shapes in a relation
    * ``texture``: one striped or dotted object
    * ``spatial``: two plain objects of different color and shape in a relation
    * ``numeracy``: two, three or four plain objects

    Sets larger than 700 (train) or 300 (novel) are thinned to that size by taking evenly spaced entries, the sizes of
    T2I-CompBench.

    Raises:
      InputError: unknown category or split.
    """
    if category not in CATEGORIES:
        raise InputError(f"prompts.category: received {category!r}; it is one of {', '.join(CATEGORIES)}")
    if split not in SPLITS:
        raise InputError(f"prompts.split: received {split!r}; it is one of {', '.join(SPLITS)}")
    novel = split == "novel"
    chosen = [spec for spec in _category(category) if is_novel(spec) == novel]
    limit = 300 if novel else 700
    if len(chosen) > limit:
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    return [describe(spec) for spec in chosen]


class LargePrompts(Sequence[str]):
    """Every single-object and every relation prompt without a held-out pair: 112 896 distinct ones, made on demand.

    Index order: 168 single objects, 504 numbers, then relations with the relation varying fastest.
    """

    def __init__(self) -> None:
        triples = itertools.product(COLORS, SHAPES, TEXTURES)
        things = [Thing(*triple) for triple in triples if triple[:2] not in HELD_OUT]
        self._singular = [_with_article(thing) for thing in things]
        self._plural = [_phrase(thing, plural=True) for thing in things]

    def __len__(self) -> int:
        n = len(self._singular)
        return n * len(NUMBERS) + n * (n - 1) * len(RELATIONS)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        n, total = len(self._singular), len(self)
        if not -total <= index < total:
            raise IndexError(index)
        index %= total
        if index < n:
            return self._singular[index]
        if index < n * len(NUMBERS):
            return f"{NUMBERS[index // n]} {self._plural[index % n]}"
        pair, relation = divmod(index - n * len(NUMBERS), len(RELATIONS))
        first, second = divmod(pair, n - 1)
        second += second >= first  # skip the identical pair
        return f"{self._singular[first]} {RELATIONS[relation]} {self._singular[second]}"


def large_prompts() -> LargePrompts:
    """Over 100 000 distinct training prompts as a sequence: cheap to make, indexable."""
    return LargePrompts()


def _category(category: str) -> Iterator[Spec]:
    if category == "texture":
        for color, shape, texture in itertools.product(COLORS, SHAPES, TEXTURES[1:]):
            yield Spec((Thing(color, shape, texture),))
    elif category == "numeracy":
        for number, color, shape in itertools.product((2, 3, 4), COLORS, SHAPES):
            yield Spec((Thing(color, shape),), None, number)
    else:
        same_color, same_shape = category == "shape", category == "color"
        things = [Thing(*pair) for pair in itertools.product(COLORS, SHAPES)]
        for first, second, relation in itertools.product(things, things, RELATIONS):
            if (first.color == second.color) == same_color and (first.shape == second.shape) == same_shape:
                if first != second:
                    yield Spec((first, second), relation)


def _mixed(novel: bool) -> list[str]:
    # Pair i of diagonal d of the color x shape table is (color i, shape 3i + d). A diagonal holds every color and every
    # shape once; diagonal 2 is held out.
    def pair(i: int, diagonal: int, texture: str = "plain") -> Thing:
        return Thing(COLORS[i % 8], SHAPES[(3 * (i % 8) + diagonal) % 8], texture)

    def own(diagonal: int) -> int:
        return 2 if novel else diagonal

    specs = [Spec((pair(i, own(0)),)) for i in range(8)]
    specs += [Spec((pair(i, own(3), TEXTURES[1 + i % 2]),)) for i in range(8)]
    for k in range(16):
        i, turn = k % 8, k // 8
        first, second = pair(i, own(4 + turn)), pair(i + 3 + 4 * turn, 5 + turn)
        specs.append(Spec((first, second) if turn == 0 else (second, first), RELATIONS[(i + 2 * turn) % 4]))
    for k in range(16):
        texture = TEXTURES[1 + k % 2] if k >= 8 else "plain"
        specs.append(Spec((pair(k, own(7 if k < 8 else 1), texture),), None, 2 + k % 3))
    return [describe(spec) for spec in specs]
