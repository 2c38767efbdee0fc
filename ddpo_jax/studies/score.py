"""Scores image files: how a person checks a reward against its published values.

Images are read as the published scores were computed: by Pillow, converted to RGB. So transparency is dropped, of an
animation the first frame counts, and a camera's note on how to turn the picture (EXIF) is not followed.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image

from ddpo_jax.errors import InputError, RunFailure, one_line
from ddpo_jax.mini.world import IMAGE_SIZE
from ddpo_jax.prompts import _text
from ddpo_jax.rewards._shared.check import RewardError, RewardFn, call

CHUNK = 64  # images in memory at a time
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no format whose reader starts another program
COLUMNS = ("file", "prompt")
_DEEP = ("I", "F")  # begin the names of Pillow's modes of more than 8 bits, which its conversion cuts off at 255
_ROTATION = 0x0112  # EXIF's tag; 1 is upright


@dataclasses.dataclass(frozen=True)
class Item:
    """An image file, the prompt it is scored for, and what else the reward is told."""

    path: pathlib.Path
    prompt: str
    metadata: dict[str, Any]


def one_prompt(paths: Sequence[str], prompt: str) -> list[Item]:
    """Files that are scored for the same prompt.

    Raises:
      InputError: the prompt is none.
    """
    if (wrong := _text.fault(prompt)) is not None:
        raise InputError(f"--prompt: received {prompt!r:.80}; it {wrong}")
    return [Item(pathlib.Path(path).expanduser(), prompt, {}) for path in paths]


def read_items(path: str) -> list[Item]:
    """The images that a file of prompts names, relative to its own folder, in its order.

    A name in .jsonl has one JSON object a line, any other is CSV with a line of names first. ``file`` and ``prompt``
    are what they say; all other columns or keys are metadata.

    Raises:
      InputError: the file cannot be read, or a line of it is broken.
    """
    try:
        numbered = _text.lines(path, "it must be a CSV or .jsonl file")
        if path.lower().endswith(".jsonl"):
            rows = [(number, *_text.row(path, number, line)) for number, line in numbered]
        else:
            rows = [
                (number, _text.checked(path, number, entry.pop("prompt").strip()), entry)
                for number, entry in _csv(path, numbered)
            ]
        return [_item(path, *row) for row in rows]
    except InputError as error:  # it speaks of a run's key
        raise InputError(str(error).replace("prompts.path", "--prompts")) from error


def _csv(path: str, numbered: list[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file, with the numbers of the lines they end on."""
    reader = csv.DictReader((f"{line}\n" for _, line in numbered), strict=True)
    found = []
    try:
        if absent := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise InputError(
                f"{_text.refusal(path)}its first line has no column {' and no '.join(absent)}; begin with file,prompt"
            )
        for row in reader:
            number, count = numbered[reader.line_num - 1][0], len(reader.fieldnames or ())
            if None in row or None in row.values():
                raise InputError(
                    f"{_text.refusal(path)}line {number} does not have the {count} values that the first line names; "
                    "put a value with commas in quotes"
                )
            found.append((number, row))
        if not found:
            raise InputError(f"{_text.refusal(path)}it names no image; write one a line, below file,prompt")
    except csv.Error as error:
        number = numbered[reader.reader.line_num - 1][0]
        raise InputError(f"{_text.refusal(path)}line {number} is broken: {error}; mend its quotes") from error
    return found


def _item(path: str, number: int, prompt: str, entry: dict[str, Any]) -> Item:
    file = entry.pop("file", None)
    if not isinstance(file, str) or not file.strip():
        raise InputError(f"{_text.refusal(path)}line {number} names no image; give it as file")
    return Item(pathlib.Path(path).expanduser().parent / file.strip(), prompt, entry)


def read_image(path: pathlib.Path, warn: bool = False) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a file as Pillow converts them to RGB.

    Args:
      path: of the file.
      warn: say in the log if it notes a rotation, which is not applied.

    Raises:
      InputError: in one line, why there are none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if picture.mode.startswith(_DEEP):
                    raise InputError(
                        f"{path}: it has the colour mode {picture.mode}, of more than 8 bits a channel; save it as RGB"
                    )
                pixels = np.asarray(picture.convert("RGB"))
                if warn and picture.getexif().get(_ROTATION, 1) != 1:
                    logging.warning("%s: its EXIF rotation is not applied, as in the published scores", path)
                return pixels
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; give image files") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: it is a folder; give its images, or --prompts=FILE with their prompts") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: it is no image; use {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: it is too large; at most {Image.MAX_IMAGE_PIXELS} pixels; scale it down") from error
    except Exception as error:  # what else Pillow raises on damaged files is not written down
        raise InputError(f"{path}: it is no whole image: {one_line(error)}; copy or save it again") from error


def sizes(items: Sequence[Item]) -> list[tuple[int, int]]:
    """(height, width) of each image, after all of them have been decoded once.

    Raises:
      InputError: a line for every file that is no image.
    """
    found, faults = [], []
    for item in items:
        try:
            found.append(read_image(item.path, warn=True).shape[:2])
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return found


def is_miniature(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether all images have the size of the miniature's, so that its own networks are meant."""
    return set(shapes) == {(IMAGE_SIZE, IMAGE_SIZE)}


def score(
    items: Sequence[Item], shapes: Sequence[tuple[int, int]], rewards: Mapping[str, RewardFn]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Scores of N images by reward and by ``reward/part``, NaN where a part says nothing of an image.

    Args:
      items: the images; those of one size go to a reward together, at most ``CHUNK`` at once.
      shapes: of each, as ``sizes`` gives them.
      rewards: functions by name.

    Raises:
      InputError: a reward refuses an image or a prompt.
      RunFailure: a reward fails.
    """
    tables: dict[str, np.ndarray] = {}
    done = 0
    for _, group in itertools.groupby(sorted(range(len(items)), key=shapes.__getitem__), shapes.__getitem__):
        whole = list(group)
        for start in range(0, len(whole), CHUNK):
            rows = whole[start : start + CHUNK]
            images = np.stack([read_image(items[row].path) for row in rows])
            prompts, metadata = [items[row].prompt for row in rows], [items[row].metadata for row in rows]
            for name, reward in rewards.items():
                scores, parts = _call(reward, images, prompts, metadata, name)
                for column, values in {name: scores, **{f"{name}/{part}": x for part, x in parts.items()}}.items():
                    tables.setdefault(column, np.full(len(items), np.nan, np.float32))[rows] = values
            done += len(rows)
            logging.info("%d of %d images", done, len(items))
    return tables


def _call(reward: RewardFn, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]], name: str) -> Any:
    try:
        return call(reward, images, prompts, metadata, name)
    except RewardError as error:
        kind = InputError if isinstance(error.__cause__, InputError) else RunFailure
        raise kind(str(error)) from error
