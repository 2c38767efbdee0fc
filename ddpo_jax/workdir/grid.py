"""A captioned grid of images, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ddpo_jax.errors import InputError

SMALL, LARGE = 128, 256  # images are shown at least and at most this wide
FONT_SIZE = 13
LINE = 16  # height of a line of text, px
GAP = 12
MAX_LINES = 4  # of a prompt; longer ones end in an ellipsis


def captioned(images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str], title: str = "") -> Image.Image:
    """The images in reading order, each with its caption wrapped beneath it.

    Small images are enlarged by a whole number without smoothing, so that their pixels stay visible; images wider than
    256 px are reduced.

    Args:
      images: the pixels.
      captions: one per image. A line break starts a new line; the text before the first one is cut if it is long, the
        rest never is.
      title: a line over the grid.
    """
    if len(images) == 0 or len(images) != len(captions):
        raise InputError(
            f"grid: received {len(images)} images and {len(captions)} captions; expected as many, at least 1"
        )
    font = ImageFont.load_default(size=FONT_SIZE)
    tiles = [_resized(Image.fromarray(np.asarray(image))) for image in images]
    width, height = tiles[0].size
    texts = [_wrapped(caption, width, font) for caption in captions]
    columns = _columns(len(tiles))
    rows = math.ceil(len(tiles) / columns)
    # A row is as high as its longest caption asks for.
    text_heights = [max(len(text) for text in texts[r * columns : (r + 1) * columns]) * LINE + 4 for r in range(rows)]
    top = GAP + (LINE + GAP if title else 0)
    picture_width = max(GAP + columns * (width + GAP), GAP + math.ceil(font.getlength(title)) + GAP)
    picture = Image.new("RGB", (picture_width, top + sum(text_heights) + rows * (height + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((GAP, GAP), title, fill="black", font=font)
    y = top
    for r, text_height in enumerate(text_heights):
        for c, index in enumerate(range(r * columns, min((r + 1) * columns, len(tiles)))):
            x = GAP + c * (width + GAP)
            picture.paste(tiles[index], (x, y))
            for number, line in enumerate(texts[index]):
                draw.text((x, y + height + 4 + number * LINE), line, fill="black", font=font)
        y += height + text_height + GAP
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in a row, ``GAP`` apart, their upper edges in line."""
    width = sum(picture.width + GAP for picture in pictures) - GAP
    joined = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        joined.paste(picture, (x, 0))
        x += picture.width + GAP
    return joined


def _columns(count: int) -> int:
    """At most 8, a little wider than high, and without a ragged last row where that is possible."""
    ideal = math.sqrt(1.5 * count)
    even = [columns for columns in range(math.ceil(math.sqrt(count)), 9) if count % columns == 0]
    return min(even, key=lambda columns: abs(columns - ideal), default=min(8, math.ceil(ideal)))


def _resized(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width < SMALL:
        factor = math.ceil(SMALL / width)
        return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    if width > LARGE:
        return image.resize((LARGE, round(height * LARGE / width)), Image.Resampling.LANCZOS)
    return image


def _wrapped(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than ``width``; a word that alone is too wide is broken."""
    first, *rest = caption.split("\n")
    lines = [""]
    for word in first.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:  # one by one, because a word may be wider than the image
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    lines = [line for line in lines if line]
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last + "..."]
    return lines + rest
