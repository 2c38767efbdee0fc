"""The page people rate on, in a real browser: keyboard, mouse, touch, a phone, several people, a run that dies."""

import contextlib
import json
import threading
import time

import numpy as np
import pytest
from waiting import until

from ddpo_jax.feedback import app
from ddpo_jax.feedback.answers import image_name
from ddpo_jax.feedback.queue import Queue, Stopped
from ddpo_jax.serving.server import Server

pytestmark = pytest.mark.slow  # minutes in a browser, and longer on a busy machine

RNG = np.random.default_rng(4)
COLOURS = RNG.integers(0, 256, (8, 1, 1, 3), dtype=np.uint8)
IMAGES = np.ascontiguousarray(np.broadcast_to(COLOURS, (8, 24, 32, 3)))
NUMBER = {image_name(image): number for number, image in enumerate(IMAGES)}
PROMPTS = ["a cat <b>and</b> a dog", "a cat <b>and</b> a dog", "two foxes", "two foxes"]
KEY = {"left": "\ue012", "right": "\ue014", "enter": "\ue007", "backspace": "\ue003", "tab": "\ue004"}


class Run:
    """What a training run is to the page: a batch that waits to be rated."""

    def __init__(self, folder, mode="score", count=4, port=0, **options):
        self.queue = Queue(folder, mode, 0, 60.0)
        self.server = app.serve(self.queue, **{"host": "127.0.0.1", "port": port, "token": "", "flag": ""} | options)
        self.url, self.scores = app.address(self.server), None
        self._thread = threading.Thread(target=self._rate, args=(count,), daemon=True)
        self._thread.start()

    def _rate(self, count):
        with contextlib.suppress(Stopped):
            self.scores = self.queue.rate(IMAGES[:count], (PROMPTS * 2)[:count], self.url)

    def finish(self):
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.scores

    def close(self):
        self.queue.close()
        self.server.close()


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(*args, folder=tmp_path, **options):
        runs.append(Run(folder, *args, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


class Page:
    """The page in the browser."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.get("about:blank")
        browser.get(url)

    def js(self, script, *args):
        return self.browser.execute_script(f"return {script}", *args)

    def element(self, selector):
        return self.browser.find_element("css selector", selector)

    def until(self, script):
        assert until(lambda: self.js(script), 60), f"not within a minute: {script}\n{self.text()}"

    def text(self):
        return self.element("body").text

    def ready(self):
        """Waits until a question can be answered; the numbers of its images."""
        self.until("typeof ready !== 'undefined' && ready && task !== null")
        return tuple(NUMBER[name] for name in self.js("task.images"))

    def press(self, key):
        self.element("body" if self.js("document.activeElement === document.body") else ":focus").send_keys(
            KEY.get(key, key)
        )

    def answered(self, act):
        """Does ``act`` and waits until the question is another one; the numbers of the images that were asked about."""
        numbers, before = self.ready(), self.js("task.id")
        act()
        self.until(f"task === null || task.id !== '{before}'")
        return numbers

    def tap(self, selector):
        """A finger on the middle of an element."""
        send = self.browser.execute_cdp_cmd
        send("Emulation.setTouchEmulationEnabled", {"enabled": True})
        element = self.element(selector)
        box = self.js("arguments[0].scrollIntoView(), arguments[0].getBoundingClientRect()", element)
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
        send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        send("Emulation.setTouchEmulationEnabled", {"enabled": False})

    def phone(self, width=390, height=780):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_stars_by_keys_arrows_mouse_and_touch(browser, start, tmp_path):
    run = start("score", 5)
    page = Page(browser, run.url)
    assert page.ready() == (0,)
    assert page.element("#prompt").text == PROMPTS[0]  # as text, not as markup
    assert page.element("#status").text == "0 of 5 rated"
    page.element("#rater").send_keys("Zoë")
    page.element("#rater").send_keys("1")  # keys typed into the name rate nothing
    assert page.js("task.id") and page.element("#status").text == "0 of 5 rated"
    page.js("document.activeElement.blur()")

    page.answered(lambda: page.press("2"))
    assert page.element("#status").text == "1 of 5 rated" and page.js("$('progress').value / $('progress').max") == 0.2

    page.ready()
    page.press("right")  # begins in the middle
    assert page.js("document.activeElement.getAttribute('aria-label')") == "3 of 5 stars: fairly"
    page.press("right")
    assert page.js("document.querySelectorAll('#stars .on').length") == 4
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.answered(lambda: page.press("enter"))
    assert page.js("document.activeElement.getAttribute('aria-label')") == "4 of 5 stars: well"  # focus stays

    page.answered(lambda: page.element("#stars button:nth-child(5)").click())
    page.answered(lambda: page.tap("#stars button:nth-child(1)"))
    page.answered(lambda: page.press("3"))
    np.testing.assert_array_equal(
        run.finish(), [2, 4, 1, 3, 5]
    )  # prompt by prompt: the third that was asked is the fifth
    page.until("document.getElementById('idle-title').textContent === 'Thank you'")
    assert "training goes on" in page.text() and page.element("#status").text == "All rated"
    assert {line["rater"] for line in lines(tmp_path)} == {"Zoë1"}


def test_the_next_batch_appears_by_itself_and_the_name_is_remembered(browser, start, tmp_path):
    run = start("score", 1)
    page = Page(browser, run.url)
    page.ready()
    page.element("#rater").send_keys("  Bo ", KEY["tab"])
    page.answered(lambda: page.press("4"))
    run.finish()
    second = threading.Thread(target=lambda: run.queue.rate(IMAGES[5:6], ["new"], ""), daemon=True)
    second.start()
    assert page.ready() == (5,)
    assert page.js("document.title") == "(1) Rate images"
    page.browser.refresh()
    page.ready()
    assert page.js("$('rater').value") == "Bo"
    page.element("#rater").clear()
    page.element("#rater").send_keys(KEY["tab"])
    page.answered(lambda: page.press("1"))
    second.join(30)
    assert [line["rater"] for line in lines(tmp_path)] == ["Bo", "anonymous"]


def test_undo(browser, start):
    run = start("score", 3)
    page = Page(browser, run.url)
    page.ready()
    assert not page.element("#undo").is_enabled()
    page.answered(lambda: page.press("1"))
    page.ready()
    assert page.answered(lambda: page.press("backspace")) == (1,)
    assert page.ready() == (0,) and not page.element("#undo").is_enabled()
    page.answered(lambda: page.press("5"))
    page.answered(lambda: page.press("2"))
    page.ready()
    page.answered(lambda: page.element("#undo").click())
    assert page.ready() == (1,)
    page.answered(lambda: page.press("4"))
    page.answered(lambda: page.press("3"))
    np.testing.assert_array_equal(run.finish(), [5, 4, 3])


def test_pairs_by_keys_mouse_and_touch(browser, start, tmp_path):
    run = start("pairs", 8)  # of each prompt four images: six pairs
    page = Page(browser, run.url)
    page.ready()
    assert page.element("#question").text == "Which image is better for this?"
    assert not page.element("#stars").is_displayed() and page.element("#tie").is_displayed()
    acts = [
        (lambda: page.press("left"), 0),
        (lambda: page.press("right"), 1),
        (lambda: page.press("1"), 0),
        (lambda: page.press("2"), 1),
        (lambda: page.press("0"), None),
        (lambda: page.element(".choice:nth-child(1)").click(), 0),
        (lambda: page.element(".choice:nth-child(2)").click(), 1),
        (lambda: page.element("#tie").click(), None),
        (lambda: page.tap(".choice:nth-child(1)"), 0),
        (lambda: page.tap(".choice:nth-child(2)"), 1),
        (lambda: page.tap("#tie"), None),
        (lambda: (page.js("document.querySelectorAll('.choice')[1].focus()"), page.press("enter")), 1),
    ]
    won = np.zeros(8)
    for act, place in acts:
        pair = page.answered(act)
        for side in (0, 1):
            won[pair[side]] += 0.5 if place is None else side == place
    np.testing.assert_allclose(run.finish(), won / 3, rtol=1e-6)  # each image has three opponents
    assert len(lines(tmp_path)) == 12


def test_keys_that_are_held_or_meant_for_the_browser_rate_nothing(browser, start):
    run = start("score", 2)
    page = Page(browser, run.url)
    page.ready()
    for extra in ("repeat: true", "ctrlKey: true", "metaKey: true", "altKey: true"):
        page.js(f"dispatchEvent(new KeyboardEvent('keydown', {{key: '4', bubbles: true, {extra}}}))")
    for key in ("6", "0", "x", "enter"):
        page.press(key)
    time.sleep(0.3)
    assert run.queue.next("watcher")["done"] == 0


def test_every_tab_gets_another_image_and_a_reload_keeps_it(browser, start):
    run = start("score", 3)
    page = Page(browser, run.url)
    first, tab = page.ready(), browser.current_window_handle
    browser.refresh()
    assert page.ready() == first
    browser.switch_to.new_window("tab")
    try:
        browser.get(run.url)
        assert page.ready() != first
        page.until("document.getElementById('status').textContent.endsWith('2 people rating')")
        page.answered(lambda: page.press("1"))
        page.answered(lambda: page.press("1"))
        page.until("document.getElementById('idle-title').textContent === 'Almost done'")
    finally:
        browser.close()
        browser.switch_to.window(tab)
    page.answered(lambda: page.press("5"))
    assert sorted(run.finish()) == [1, 1, 5]


def test_a_run_that_dies_is_waited_for_and_no_answer_is_lost(browser, start, tmp_path):
    run = start("score", 2)
    page = Page(browser, run.url)
    page.ready()
    run.close()
    page.press("5")
    page.until("!document.getElementById('problem').hidden")
    assert "The run does not answer" in page.element("#problem").text
    again = start("score", 2, port=run.server.port)
    page.until("task !== null && document.getElementById('problem').hidden")
    page.answered(lambda: page.press("2"))
    np.testing.assert_array_equal(again.finish(), [5, 2])
    assert [line["score"] for line in lines(tmp_path)] == [5, 2]


def test_a_full_disk_is_told_and_the_answer_sent_again(browser, start, monkeypatch):
    from ddpo_jax.feedback import answers

    run = start("score", 1)
    page = Page(browser, run.url)
    page.ready()
    with monkeypatch.context() as patch:

        def full(folder, record):
            raise OSError(28, "No space left on device")

        patch.setattr(answers, "append", full)
        page.press("3")
        page.until("document.getElementById('problem').textContent.includes('No space left on device')")
    np.testing.assert_array_equal(run.finish(), [3])


def test_the_token_is_asked_for(browser, start):
    run = start("score", 1, host="0.0.0.0", token="a-Secret_1")
    local = f"http://127.0.0.1:{run.server.port}/"
    assert run.url.endswith("/#token=a-Secret_1")
    page = Page(browser, local)
    page.until("document.getElementById('problem').textContent.includes('lacks the right token')")
    page = Page(browser, f"{local}#token=a-Secret_1")
    page.answered(lambda: page.press("4"))
    np.testing.assert_array_equal(run.finish(), [4])


@pytest.mark.parametrize("mode", ["score", "pairs"])
@pytest.mark.parametrize("size", [(320, 568), (390, 780), (1100, 760)])
def test_it_fits_the_screen_and_fingers(browser, start, mode, size):
    """Nothing to scroll sideways down to 320 px; on a phone the question and its answers fit without scrolling; every
    target is at least 44 px, but the name."""
    run = start(mode, 4)
    page = Page(browser, run.url)
    page.phone(*size)
    page.ready()
    assert page.js("document.documentElement.scrollWidth") <= size[0]
    boxes = page.js(
        "[...document.querySelectorAll('button')].filter((b) => b.offsetParent).map((b) => b.getBoundingClientRect())"
        ".map((b) => [b.width, b.height, b.bottom])"
    )
    assert len(boxes) == {"score": 6, "pairs": 4}[mode]
    assert min(min(width, height) for width, height, _ in boxes) >= 44
    assert max(bottom for _, _, bottom in boxes) <= size[1]
    shapes = page.js("[...document.images].map((i) => i.getBoundingClientRect()).map((b) => b.width / b.height)")
    np.testing.assert_allclose(shapes, 32 / 24, rtol=0.02)
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_for_those_who_cannot_see_it(browser, start):
    """What a screen reader is told: controls and images have names, progress is announced."""
    for mode in ("score", "pairs"):
        run = start(mode, 2)
        page = Page(browser, run.url)
        page.ready()
        tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
        wanted = {"button", "textbox", "image", "progressbar", "heading", "group", "region"}
        assert all(name for role, name in named if role in wanted), named
        assert ("heading", PROMPTS[0]) in named and ("textbox", "Your name") in named
        assert ("progressbar", "Rated images") in named and ("button", "Undo your last answer") in named
        if mode == "score":
            assert ("button", "5 of 5 stars: very well") in named and ("image", "The image to rate") in named
        else:
            assert {("button", name) for name in ("Left is better", "Right is better", "Equally good")} <= set(named)
        assert page.js("document.documentElement.lang") == "en"
        assert page.js("$('status').getAttribute('aria-live')") == "polite"
        run.close()


def test_nothing_comes_from_elsewhere(browser, start):
    """All that the page loaded is ours, the browser complains of nothing, and foreign things are refused."""
    browser.get_log("browser")
    run = start("score", 1)
    page = Page(browser, run.url)
    page.ready()
    loaded = page.js("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith((run.url, "blob:", "data:")) for name in loaded), loaded
    assert browser.get_log("browser") == []
    with contextlib.closing(Server({"GET /": lambda request: None}, host="127.0.0.1", port=0)) as other:
        outcome = browser.execute_async_script(
            "fetch(arguments[0]).then(() => arguments[1]('fetched'), () => arguments[1]('refused'))", other.url
        )
    assert outcome == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
