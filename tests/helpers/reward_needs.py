"""What a reward cannot do without when the conformance tests try it: options, prompts that it can judge, pictures.

A reward that is not named here is tried with its defaults, on any prompts and on noise.
"""

from __future__ import annotations

import numpy as np

from ddpo_jax.mini import world

PROMPTS = [
    "a red circle",
    "a striped blue star",
    "three green squares",
    "a red circle",
    "a pink ring above a black cross",
]


def noise():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def pictures():
    """Of the captions below: what is drawn is there."""
    return world.render_all(world.scenes_for([world.parse(caption) for caption in RELATIONS], np.random.default_rng(0)))


RELATIONS = [f"a red circle {relation} a blue star" for relation in ("left of", "right of", "above", "below", "above")]
QUOTING = [f'a sign that says "{text}"' for text in ("cat", "two green dogs", "the sky", "OPEN", "three")]
NEEDS = {
    "spatial": {"prompts": RELATIONS, "images": pictures},
    "numeracy": {"prompts": RELATIONS, "images": pictures},
    "ocr": {"prompts": QUOTING, "options": {"recogniser": "tiny_models:read"}},
    "vlm": {"options": {"answerer": "tiny_models:answer", "encoder": "tiny_models:encode"}},
}


def of(name):
    """(options, prompts, function that makes the images) for a reward."""
    need = NEEDS.get(name, {})
    return need.get("options", {}), need.get("prompts", PROMPTS), need.get("images", noise)
