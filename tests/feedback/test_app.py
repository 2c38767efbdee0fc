"""What the page talks to: what is given to whom, and what is refused."""

import json
import re

import http_tools
import numpy as np
import pytest
from http_tools import ask

from ddpo_jax.feedback import app
from ddpo_jax.feedback.answers import image_name
from ddpo_jax.feedback.queue import Queue

IMAGES = np.random.default_rng(5).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path, "score", 0, 60.0)


@pytest.fixture
def url(queue):
    server = app.serve(queue, host="127.0.0.1", port=0, token="", flag="--")
    yield server.url
    queue.close()
    server.close()


def test_people_rate_a_batch_over_http(queue, url, tmp_path):
    with http_tools.rated(url, http_tools.stars, count=3) as people:
        scores = queue.rate(IMAGES, list("aabb"), url)
    np.testing.assert_array_equal(scores, [http_tools.stars(None, [image]) for image in IMAGES])
    assert sum(person.given for person in people) == 4 and not any(person.faults for person in people)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4


def test_the_page_and_the_images(queue, url):
    status, headers, body = ask(url)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and b"<!doctype html>" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    queue._save(image_name(IMAGES[0]), IMAGES[0])
    status, headers, body = ask(f"{url}/images/{image_name(IMAGES[0])}.png")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    np.testing.assert_array_equal(http_tools.read_png(body), IMAGES[0])


@pytest.mark.parametrize(
    "name", ["../answers.jsonl", "%2e%2e%2fanswers.jsonl", "0" * 64 + ".png", "", "x.png", "..%2f..%2fetc%2fpasswd"]
)
def test_no_other_file_is_given_away(queue, url, tmp_path, name):
    (tmp_path / "answers.jsonl").write_text("")
    assert ask(f"{url}/images/{name}")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/answer", [], 400, "the body must be a JSON object"),
        ("/answer", {"page": "x", "rater": "y", "id": "z"}, 400, "'value' is missing"),
        ("/answer", {"page": "x", "rater": "y", "id": "z", "value": 1}, 409, "no longer asked about"),
        ("/answer", {"page": "x", "rater": 3, "id": "z", "value": 1}, 400, "'rater' must be text of 1 to 80"),
        ("/answer", {"page": "x", "rater": "y" * 81, "id": "z", "value": 1}, 400, "'rater' must be text"),
        ("/answer", {"page": "x", "rater": "a\nb", "id": "z", "value": 1}, 400, "'rater' must be text"),
        ("/undo", {"page": "x"}, 409, "no answer of yours"),
        ("/undo", {}, 400, "'page' must be text"),
        ("/undo", b"page=x", 400, "the body is not JSON"),
    ],
)
def test_bad_requests_are_one_line(url, path, body, status, message):
    headers = {"Content-Type": "application/json"}
    received, _, reply = ask(f"{url}{path}", "POST", body, headers)
    assert received == status and message in reply["error"]
    assert ask(f"{url}/next")[0] == 400  # without a page
    assert ask(f"{url}/next?page=x")[2]["total"] == 0


def test_a_form_of_another_site_is_refused(url):
    body = json.dumps({"page": "x", "rater": "y", "id": "z", "value": 1}).encode()
    assert ask(f"{url}/answer", "POST", body, {"Content-Type": "text/plain"})[0] == 415
    assert ask(f"{url}/next?page=x", headers={"Host": "evil.example"})[0] == 403


# ---- what the page itself says, without a browser ----


def test_the_page_is_one_file():
    text = app.PAGE.read_text("utf-8")
    assert not re.search(r"https?://|@import|<link[^>]+href=\"(?!data:)|\ssrc=", text)
    assert len(text) < 40_000


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Of WCAG 2.2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_both_colour_schemes():
    """Text at least 4.5 : 1 on what it stands on, borders, stars and the focus ring at least 3 : 1 (WCAG 2.2, AA)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    blocks = re.findall(r":root \{(.*?)\}", app.PAGE.read_text("utf-8"), re.S)
    assert len(blocks) == 2
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
        for text in ("text", "soft"):
            for ground in ("page", "card"):
                assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        assert (
            contrast(colour["accent"], colour["card"]) >= 4.5 and contrast(colour["alarm"], colour["alarm-page"]) >= 4.5
        )
        for line in ("line", "star", "accent"):
            assert contrast(colour[line], colour["card"]) >= 3, line
            assert contrast(colour[line], colour["page"]) >= 3, line
