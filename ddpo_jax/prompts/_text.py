"""What a prompt may be, and the reading of files that hold prompts."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from ddpo_jax.errors import InputError

MAX_CHARS = 10_000  # no text encoder reads a tenth of this; a longer line is a file of another kind
PROMPT_KEYS = ("prompt", "caption")  # of a row of JSONL
_LINE_END = re.compile(r"\r\n|\r|\n")  # what an editor shows as one line is one line: not U+2028, not form feed
_AN, _A = re.compile(r"hour|honest|heir|[aeiou]"), re.compile(r"uni[^n]|eu|use|one")


def fault(prompt: str) -> str | None:
    """What is wrong with a prompt, in words that follow its place, such as "is empty"; None where nothing is."""
    if len(prompt) > MAX_CHARS:
        return f"has {len(prompt)} characters; a prompt may have at most {MAX_CHARS}; one prompt is one line"
    if not prompt.strip():
        return "is empty; a prompt needs at least one word"
    if "\0" in prompt:
        return "has a zero byte, so this is no text; save the file as UTF-8"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(prompt[error.start]):04X}"
        return f"has half of a character ({half}, a lone surrogate) at {error.start}; write the whole character"
    return None


def refusal(path: str) -> str:
    """The beginning of every message about a file of prompts."""
    return f"prompts.path: received {path!r}; "


def lines(path: str, wanted: str = "") -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file that are not empty, stripped, with their numbers from 1.

    Args:
      path: the file; ``~`` is the home folder.
      wanted: what the file should be, for the message when ``path`` is empty.

    Raises:
      InputError: in one line, why there are none: no such file, not UTF-8, nothing in it, or a line that no prompt is.
    """
    start = refusal(path)
    if not path:
        raise InputError(f"{start}{wanted}; write prompts.path=FILE")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{start}{'it is a folder' if file.is_dir() else 'there is no such file'}; give a text file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{start}byte {error.start} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{start}it cannot be read: {error.strerror}; give a file you can read") from error
    stripped = ((number, line.strip()) for number, line in enumerate(_LINE_END.split(text), 1))
    found = [(number, line) for number, line in stripped if line]
    if not found:
        raise InputError(f"{start}the file has no prompts; write one a line")
    return found


def checked(path: str, number: int, prompt: str) -> str:
    """``prompt``, if it can be one.

    Raises:
      InputError: it cannot; the message names the line of the file.
    """
    if (wrong := fault(prompt)) is not None:
        raise InputError(f"{refusal(path)}line {number} {wrong}")
    return prompt


def row(path: str, number: int, line: str) -> tuple[str, dict[str, Any]]:
    """A line of JSONL as (prompt, metadata): ``{"prompt": "a cat", "count": 1}`` is ("a cat", {"count": 1}).

    Raises:
      InputError: it is no JSON object with a prompt; the message names the line of the file.
    """
    start = f"{refusal(path)}line {number} "
    rule = f"write one object a line with the key {' or '.join(PROMPT_KEYS)}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{start}is not JSON: {error.msg} at column {error.colno}; {rule}") from error
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise InputError(f"{start}is not JSON that can be read ({type(error).__name__}); {rule}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{start}is a JSON {type(entry).__name__}, not an object; {rule}")
    key = next((key for key in PROMPT_KEYS if key in entry), None)
    if key is None:
        raise InputError(f"{start}has no prompt: its keys are {', '.join(map(repr, entry))[:200] or 'none'}; {rule}")
    prompt = entry.pop(key)
    if not isinstance(prompt, str):
        raise InputError(f"{start}has the {key} {prompt!r:.80}, which is no text; write it in quotes")
    return checked(path, number, prompt.strip()), entry


def insert(template: str, place: str, noun: str) -> str:
    """``template`` with ``noun`` at ``place``, such as "{animal}", and the right article before it."""
    word = noun.lower()
    if _AN.match(word) and not _A.match(word):
        template = re.sub(rf"\b([aA]) {re.escape(place)}", rf"\1n {place}", template)
    return template.replace(place, noun)


def check_template(template: str, place: str, example: str) -> None:
    """Refuses a template without its place.

    Raises:
      InputError: ``place`` is not in it.
    """
    if place not in template:
        raise InputError(f"prompts.template: received {template!r}; it must contain {place}; use {example!r}")
