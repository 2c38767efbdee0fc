"""Values from text: a config file's argument and the command line's overrides, and what an unknown key meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.config.defaults import BY_NAME, FAMILIES, OPEN, ByModel, Computed, choose
from ddpo_jax.config.keys import TYPE_NAMES, flatten, get, parse, put, split, unquoted
from ddpo_jax.errors import InputError


def with_choices(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies a config file's argument, such as ``algorithm=loop,train.learning_rate=1e-4``, and returns ``config``.

    A section's bare name stands for its ``name`` key. Commas inside brackets or quotes do not separate.

    Raises:
      InputError: one line for each fault.
    """
    pairs, faults = [], []
    for item in split(arg):
        key, equals, value = item.partition("=")
        if not equals:
            faults.append(f"config argument: received {item!r}; it must be key=value, such as algorithm=loop")
            continue
        key = key.strip()
        pairs.append((f"{key}.name" if key in FAMILIES else key, unquoted(value.strip())))
    if faults:
        raise InputError("\n".join(faults))
    override(config, pairs)
    return config


def override(config: ConfigDict, pairs: Iterable[tuple[str, str]]) -> None:
    """Sets keys from text, in place: members first, since they bring keys of their own; then the rest in order.

    Args:
      config: changed in place.
      pairs: (key, text), such as ("train.learning_rate", "1e-4").

    Raises:
      InputError: one line for each unknown key and each value of the wrong type.
    """
    names = [f"{family}.name" for family in FAMILIES]
    pairs, faults = list(pairs), []
    for key, text in sorted(pairs, key=lambda pair: pair[0] not in names):
        try:
            if key in names:
                choose(config, key.removesuffix(".name"), text)
            elif key not in (known := flatten(config)):
                raise InputError(unknown_key(config, key, list(known)))
            else:
                put(config, key, _value(config, key, text))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))


def unknown_key(config: ConfigDict, key: str, known: list[str]) -> str:
    """One line that says what was probably meant by a key that does not exist."""
    section, _, option = key.partition(".")
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        return f"unknown key {key!r}: it is a section; its keys are {', '.join(inside)}"
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    last = key.rpartition(".")[2]
    near = (
        by_last_part.get(last)
        or find.nearest(key, known)
        or by_last_part.get(find.nearest(last, [*by_last_part]) or "")
    )
    line = f"unknown key {key!r}: " + (f"nearest is {near!r}" if near else f"keys are {', '.join(known)}")
    if section not in FAMILIES or not option:
        return line
    name, own = config[section].name, [k for k in known if k.startswith(section + ".")]
    if name == "auto":
        return f"unknown key {key!r}: {section}.name is 'auto', which has no options; set {section}.name too"
    return f"{line}; {section}.name is {name!r}, whose keys are {', '.join(own)}"


def declared_type(config: ConfigDict, key: str) -> type | None:
    """The type a key's value must have, or None where a member leaves it open (its default is None)."""
    default = BY_NAME[key].default if key in BY_NAME else None
    if isinstance(default, ByModel):
        return type(default.miniature)
    if isinstance(default, Computed):
        return default.type
    section, _, last = key.rpartition(".")
    kind = (get(config, section) if section else config).get_type(last)
    return None if kind is type(None) else kind


def _value(config: ConfigDict, key: str, text: str) -> Any:
    if text.lower() == "none" and key in OPEN:
        return None
    kind, default = declared_type(config, key), get(config, key)
    elements = type(default[0]) if isinstance(default, tuple | list) and default else None
    try:
        return parse(text, kind, elements)
    except ValueError:
        rule = TYPE_NAMES.get(kind, "a value")
        by_model = BY_NAME[key].default if key in OPEN else None
        usual = by_model.miniature if isinstance(by_model, ByModel) else None
        example = next(value for value in (default, usual, 1) if value is not None)
        raise InputError(f"{key}: received {text!r}; it must be {rule}; write for example {key}={example}") from None
