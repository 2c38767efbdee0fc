"""The JSON of rewards: what goes in comes out, and everything else is refused in one line."""

import base64
import io
import json
import struct
import zlib

import http_tools
import numpy as np
import pytest
from PIL import Image

from ddpo_jax.serving import protocol

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
PROMPTS = ["a cat", "ein Bär", "two\nlines"]
GOOD = http_tools.png(IMAGES[0])


def test_a_request_survives_the_wire():
    metadata = [{}, {"count": np.int64(3), "box": np.ones((1, 2), np.float32)}, {"words": ("a", None), 7: True}]
    body = json.loads(json.dumps(protocol.encode_request(IMAGES, PROMPTS, metadata)))
    for text, image in zip(body["image"], IMAGES, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:  # by Pillow alone
            assert picture.format == "PNG"
            np.testing.assert_array_equal(np.asarray(picture), image)
    images, prompts, described = protocol.decode_request(body)
    np.testing.assert_array_equal(images, IMAGES)
    assert prompts == PROMPTS
    assert described == [{}, {"count": 3, "box": [[1.0, 1.0]]}, {"words": ["a", None], "7": True}]


def test_metadata_may_be_left_out_and_must_be_plain():
    images, _, metadata = protocol.decode_request({"prompt": ["x"], "image": [GOOD]})
    np.testing.assert_array_equal(images, IMAGES[:1])
    assert metadata == [{}]
    with pytest.raises(protocol.ProtocolError, match="metadata holds a set"):
        protocol.encode_request(IMAGES[:1], ["x"], [{"colours": {1, 2}}])


def truncated(text, part=0.6):
    data = base64.b64decode(text)
    return base64.b64encode(data[: int(len(data) * part)]).decode()


def empty_png(width, height):
    """A PNG of any size with hardly any pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9)))).decode()


BODIES = [
    ([], "the body is a list; it must be an object"),
    ("x", "the body is text"),
    ({"image": [GOOD]}, "no 'prompt'"),
    ({"prompt": ["x"]}, "no 'image'"),
    ({"prompt": "x", "image": [GOOD]}, "'prompt' is text; it must be a list"),
    ({"prompt": ["x"], "image": {"a": 1}}, "'image' is an object"),
    ({"prompt": ["x"], "image": [GOOD], "metadata": None}, "'metadata' is null"),
    ({"prompt": ["x", "y"], "image": [GOOD]}, "received 2 prompts, 1 images and 2 metadata"),
    ({"prompt": ["x"], "image": [GOOD], "metadata": []}, "received 1 prompts, 1 images and 0 metadata"),
    ({"prompt": [], "image": []}, "received no image"),
    ({"prompt": [3], "image": [GOOD]}, "prompt 0 is a number"),
    ({"prompt": ["x"], "image": [GOOD], "metadata": [3]}, "metadata 0 is a number"),
    ({"prompt": ["x"], "image": [False]}, "image 0 is true or false"),
    ({"prompt": ["x"], "image": ["***"]}, "image 0 is not base64"),
    ({"prompt": ["x"], "image": ["ü"]}, "image 0 is not base64"),
    ({"prompt": ["x"], "image": [""]}, r"image 0 is not a PNG file \(0 bytes\)"),
    ({"prompt": ["x"], "image": [base64.b64encode(b"<html>").decode()]}, "image 0 is not a PNG file"),
    ({"prompt": ["x"], "image": [http_tools.png(IMAGES[0], form="JPEG")]}, "image 0 is not a PNG file"),
    ({"prompt": ["x"], "image": [truncated(GOOD)]}, "image 0 is not a whole PNG file"),
    ({"prompt": ["x"], "image": [truncated(GOOD, 0.1)]}, "image 0 is not a"),
    ({"prompt": ["x"], "image": [http_tools.png(IMAGES[0], "RGBA")]}, "image 0 has the colour mode RGBA"),
    ({"prompt": ["x"], "image": [http_tools.png(IMAGES[0], "L")]}, "image 0 has the colour mode L"),
    ({"prompt": ["x"], "image": [empty_png(12000, 12000)]}, "image 0 is too large"),
    ({"prompt": ["x"], "image": [empty_png(60000, 60000)]}, "image 0 is too large"),
    ({"prompt": ["x"] * 2, "image": [GOOD, empty_png(9000, 9000)]}, "image 1 is too large"),
    (
        {"prompt": ["x"] * 2, "image": [GOOD, http_tools.png(IMAGES[0][:5])]},
        "image 0 is 4 x 6 and image 1 is 4 x 5; all images of a request must have one size",
    ),
]


@pytest.mark.parametrize(("body", "message"), BODIES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_request_is_refused_in_one_line(body, message):
    with pytest.raises(protocol.ProtocolError, match=message) as caught:
        protocol.decode_request(body)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_a_reply_survives_the_wire_exactly():
    scores = np.float32([0.1, -3e38, 1e-40])
    parts = {"words": np.float32([1, np.nan, np.inf])}
    text = json.dumps(protocol.encode_reply(scores, parts), allow_nan=False)
    assert '"words": [1.0, null, null]' in text
    values, found = protocol.decode_reply(json.loads(text))
    np.testing.assert_array_equal(np.float32(values), scores)
    np.testing.assert_array_equal(np.float32(found["words"]), np.float32([1, np.nan, np.nan]))
    assert "parts" not in protocol.encode_reply(scores, {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1.0], "answered a list; it must be an object with 'rewards'"),
        ({"scores": [1]}, "answered an object with 'scores'"),
        ({}, "answered an object with nothing in it"),
        ({"rewards": 1.5}, "rewards that are a number"),
        ({"rewards": None}, "rewards that are null"),
        ({"rewards": [1.0], "parts": [1]}, "parts that are not an object of lists"),
        ({"rewards": [1.0], "parts": {"a": 1}}, "parts that are not an object of lists"),
    ],
)
def test_what_is_no_reply_is_refused_in_one_line(body, message):
    with pytest.raises(protocol.ProtocolError, match=message):
        protocol.decode_reply(body)
