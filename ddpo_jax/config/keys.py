"""Config keys as dotted names, and values as text: what overrides, validation and the help share."""

from __future__ import annotations

import ast
import json
from typing import Any

from ml_collections import ConfigDict

from ddpo_jax.errors import InputError, one_line

TYPE_NAMES: dict[type | None, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "values with commas",
}


def get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key that exists."""
    section, _, last = key.rpartition(".")
    (get(config, section) if section else config)[last] = value


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, sorted within each section; None where a member left a typed placeholder empty."""
    flat: dict[str, Any] = {}
    for key, value in config.items(preserve_field_references=False):
        if isinstance(value, ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def parse(text: str, kind: type | None, elements: type | None = None) -> Any:
    """The value that ``text`` writes.

    Args:
      text: as typed.
      kind: type of the value; None takes a Python literal, or else the text itself.
      elements: type of each element where ``kind`` is tuple or list; None as above.

    Raises:
      InputError: the text does not write such a value.
    """
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise InputError(text)
        return text.lower() in ("true", "1")
    if kind in (int, float):
        return kind(text)
    if kind in (tuple, list):
        text = text.strip()
        inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        return kind(parse(item, elements) for item in split(inner))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def unquoted(text: str) -> str:
    """``text`` without the quotes around it, if one pair of them holds all of it."""
    whole = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]
    return text[1:-1] if whole else text


def split(text: str) -> list[str]:
    """The parts between commas that are outside brackets and quotes, stripped, without empty ones."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, ended by a newline; tuples become lists."""
    return json.dumps(config.copy_and_resolve_references().to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that ``to_json`` wrote, locked.

    Raises:
      InputError: the text is not a JSON object of a config.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"config.json: line {error.lineno}: {error.msg}; restore it or use another folder") from None
    if not isinstance(data, dict):
        raise InputError(f"config.json: received {type(data).__name__}; it must be a JSON object")
    return from_object(data, "config.json")


def from_object(data: dict[str, Any], path: str) -> ConfigDict:
    """The config of a JSON object, locked; ``path`` is where it was read, for messages.

    Raises:
      InputError: the object is no config: a name that cannot be a key, lists or objects nested without end.
    """

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    try:
        return ConfigDict(restore(data)).lock()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: it is no config: {one_line(error)}; restore it or use another folder") from error
