"""What the JSON files of a model folder may hold: one table a file, key by key, checked before a value is used.

A key that a file leaves out takes the default of its config class. What needs two keys at once (a number of groups
must divide a number of channels) is checked by the config classes themselves.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError

ConfigT = TypeVar("ConfigT")

FIX = "restore the file"
MAX_SIZE = 1 << 16  # of a side or a width; more than any network has, and few enough to count with
_MAX_LAYERS = 256
_MAX_LEVELS = 8
_MAX_STEPS = 100_000
MAX_TOKENS = 1 << 24
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
_OTHER_MODEL = "use a Stable Diffusion 1.x or 2.x model"


class Rule(NamedTuple):
    """What a value must be: a test that takes anything JSON can hold, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def shown(value: Any) -> str:
    """A value in a message: short, however large or deep it is."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother, brief.maxlist, brief.maxtuple = 3, 80, 80, 8, 8
    return brief.repr(value)


# --- kinds ------------------------------------------------------------------------------------------------------------


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether it is a whole number in [low, high]; ``true`` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether it is a number, NaN and infinities included; ``true`` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(low: int, high: int) -> Rule:
    """A whole number in [low, high]."""
    return Rule(lambda value: is_whole(value, low, high), f"it must be a whole number from {low} to {high}")


def between(low: float, high: float) -> Rule:
    """A number above ``low`` and below ``high``."""
    return Rule(lambda value: is_number(value) and low < value < high, f"it must be a number in ({low:g}, {high:g})")


def one_of(*options: Any) -> Rule:
    """One of a few values; ``true`` is not the number 1."""
    words = ", ".join(map(shown, options))
    if len(options) == 1:
        return Rule(lambda value: _same(value, options[0]), f"only {words} is supported")
    return Rule(lambda value: any(_same(value, option) for option in options), f"it must be one of {words}")


def number(low: float, high: float) -> Rule:
    """A number in [low, high]."""
    return Rule(
        lambda value: is_number(value) and low <= value <= high, f"it must be a number from {low:g} to {high:g}"
    )


def many(item: Rule, low: int, high: int, words: str) -> Rule:
    """A list of ``low`` to ``high`` values that each follow ``item``."""
    return Rule(lambda value: _is_list(value, low, high) and all(map(item.holds, value)), words)


def either(first: Rule, second: Rule) -> Rule:
    """What one of two rules allows."""
    words = f"{first.words}, or {second.words.removeprefix('it must be ')}"
    return Rule(lambda value: first.holds(value) or second.holds(value), words)


def _is_list(value: Any, low: int, high: int) -> bool:
    return isinstance(value, list | tuple) and low <= len(value) <= high


def _same(value: Any, option: Any) -> bool:
    return value == option and isinstance(value, bool) == isinstance(option, bool)


BOOL = Rule(lambda value: isinstance(value, bool), "it must be true or false")
TEXT = Rule(lambda value: isinstance(value, str) and value != "", "it must be a text")
NULL = Rule(lambda value: value is None, "it must be null")
OBJECT = Rule(lambda value: isinstance(value, dict), "it must be an object")
SIZE = whole(1, MAX_SIZE)
_LAYERS = whole(1, _MAX_LAYERS)
_EPSILON = between(0, 1)
_SIZES = many(SIZE, 1, _MAX_LEVELS, f"it must be a list of 1 to {_MAX_LEVELS} whole numbers above 0")
_TEXTS = many(TEXT, 1, _MAX_LEVELS, f"it must be a list of 1 to {_MAX_LEVELS} texts")
_SIDES = either(SIZE, many(SIZE, 2, 2, "it must be two of them, height and width"))
_BETA = between(0, 1)
_CLASS = many(TEXT, 2, 2, "it must be a list of two texts, library and class")
_TOKEN = Rule(
    lambda value: TEXT.holds(value["content"] if isinstance(value, dict) and "content" in value else value),
    'it must be a text, or an object whose "content" is one',
)

# --- tables -----------------------------------------------------------------------------------------------------------

MODEL_INDEX = {
    "_class_name": one_of("StableDiffusionPipeline"),
    **dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer", "scheduler"), _CLASS),
}
UNET = {
    "sample_size": either(_SIDES, NULL),
    "in_channels": SIZE,
    "out_channels": SIZE,
    "down_block_types": _TEXTS,
    "up_block_types": _TEXTS,
    "block_out_channels": _SIZES,
    "layers_per_block": _LAYERS,
    "cross_attention_dim": SIZE,
    "attention_head_dim": either(SIZE, _SIZES),
    "use_linear_projection": BOOL,
    "norm_num_groups": SIZE,
    "norm_eps": _EPSILON,
    "flip_sin_to_cos": BOOL,
    "freq_shift": Rule(lambda value: is_number(value) and 0 <= value <= MAX_SIZE, "it must be a number, 0 or more"),
}
VAE = {
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "down_block_types": _TEXTS,
    "up_block_types": _TEXTS,
    "block_out_channels": _SIZES,
    "layers_per_block": _LAYERS,
    "latent_channels": SIZE,
    "norm_num_groups": SIZE,
    "scaling_factor": between(0, 1e6),
    "use_quant_conv": BOOL,
    "use_post_quant_conv": BOOL,
    "mid_block_add_attention": BOOL,
}
_CLIP_TOWER = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "projection_dim": SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": SIZE,
    "hidden_act": TEXT,
    "layer_norm_eps": _EPSILON,
}
CLIP_TEXT = _CLIP_TOWER | {
    "vocab_size": whole(1, MAX_TOKENS),
    "max_position_embeddings": SIZE,
    "eos_token_id": whole(0, MAX_TOKENS - 1),
}
CLIP_VISION = _CLIP_TOWER | {"num_channels": one_of(3), "image_size": SIZE, "patch_size": SIZE}
CLIP = {
    "projection_dim": SIZE,
    "logit_scale_init_value": number(-100, 100),
    **dict.fromkeys(("text_config", "text_config_dict", "vision_config", "vision_config_dict"), either(OBJECT, NULL)),
}
_COLOURS = "it must be a list of three numbers"
CLIP_IMAGES = {
    "image_mean": many(number(0, 1), 3, 3, _COLOURS),
    "image_std": many(between(0, 1e3), 3, 3, _COLOURS),
}
DEBERTA = {
    "vocab_size": whole(1, MAX_TOKENS),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"), SIZE),
    "num_hidden_layers": _LAYERS,
    "max_relative_positions": whole(-1, MAX_SIZE),
    "layer_norm_eps": _EPSILON,
    "pad_token_id": whole(0, MAX_TOKENS),
    "pos_att_type": either(TEXT, either(NULL, _TEXTS)),
}
AESTHETIC_HEAD = {"embed_dim": SIZE, "widths": many(SIZE, 5, 5, "it must be a list of five whole numbers above 0")}
SCHEDULER = {
    "_class_name": TEXT,
    "num_train_timesteps": whole(1, _MAX_STEPS),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": one_of(*BETA_SCHEDULES),
    "trained_betas": either(NULL, many(_BETA, 1, _MAX_STEPS, "it must be a list of numbers in (0, 1)")),
    "prediction_type": one_of(*PREDICTION_TYPES),
    "timestep_spacing": one_of(*SPACINGS),
    "steps_offset": whole(0, _MAX_STEPS),
    "set_alpha_to_one": BOOL,
    **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr"), one_of(False)),
}
TOKENIZER = {
    "model_max_length": whole(2, 100_000),  # transformers writes 1e30 for "no limit", which cannot be padded to
    **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), either(_TOKEN, NULL)),
}

# --- checking ---------------------------------------------------------------------------------------------------------


def faults(values: Mapping[str, Any], table: Mapping[str, Rule], fix: str = FIX) -> list[str]:
    """One line ``key: received X; rule; fix`` for each value that breaks the rule of its key; other keys are free."""
    return [
        f"{key}: received {shown(values[key])}; {rule.words}; {fix}"
        for key, rule in table.items()
        if key in values and not rule.holds(values[key])
    ]


def refuse(where: str, lines: Iterable[str]) -> None:
    """Raises one ``InputError`` of all lines, each after the file it speaks of; of no lines it does nothing."""
    text = "\n".join(f"{where} {line}".strip() for line in lines)
    if text:
        raise InputError(text)


def check(where: str, values: Mapping[str, Any], table: Mapping[str, Rule], fix: str = FIX) -> None:
    """Raises InputError of all values that break their rule.

    Args:
      where: the file, for the message.
      values: the file's content.
      table: a rule for each key that is used.
      fix: what the user can do.
    """
    refuse(where, faults(values, table, fix))


def read(path: Path, table: Mapping[str, Rule], fix: str = FIX) -> dict[str, Any]:
    """The object in a JSON file, see ``check``.

    Raises:
      InputError: it cannot be read, or a line for each value that breaks its rule.
    """
    values = read_json(path)
    check(str(path), values, table, fix)
    return values


def read_config(
    cls: type[ConfigT],
    raw: Mapping[str, Any],
    table: Mapping[str, Rule],
    *,
    class_name: str,
    fixed: Mapping[str, Collection[Any]],
    ignored: Collection[str],
    where: str = "",
) -> ConfigT:
    """Builds the dataclass ``cls`` from the content of a folder's ``config.json``.

    A key that is absent takes the default of ``cls``, which is the default of the PyTorch class: files written by older
    versions rely on it. Lists become tuples.

    Args:
      cls: frozen dataclass whose fields are the options that are honoured.
      raw: the parsed JSON.
      table: a rule for every field.
      class_name: the ``_class_name`` the file must carry, when it carries one.
      fixed: options that exist upstream of which only the given values are supported.
      ignored: keys without effect on the computation. Keys that start with an underscore are metadata.
      where: the file, for the message.

    Raises:
      InputError: a line for every option that is unknown, of the wrong kind or not supported.
    """
    where = where or f"{class_name} config.json"
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kept = {key: value for key, value in raw.items() if key in names}
    allowed = {"_class_name": one_of(class_name)} | {key: one_of(*options) for key, options in fixed.items()}
    lines = faults(raw, allowed, _OTHER_MODEL) + faults(kept, table)
    lines += [
        f"{key}: received {shown(value)}; the option is unknown; {_OTHER_MODEL}"
        for key, value in raw.items()
        if not (key in kept or key in allowed or key in ignored or key.startswith("_"))
    ]
    refuse(where, lines)
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
    except InputError as error:  # of values that do not go together
        refuse(where, str(error).splitlines())
        raise
