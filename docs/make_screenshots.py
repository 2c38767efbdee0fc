"""Photographs the rating page of docs/rewards.md: python docs/make_screenshots.py

Needs selenium, Debian's chromium and chromium-driver, and the extra serve. The images on the page are drawn by the
miniature's world.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
import time

import numpy as np
from PIL import Image
from selenium import webdriver

from ddpo_jax.feedback import app
from ddpo_jax.feedback.queue import Queue, Stopped
from ddpo_jax.mini import world

PROMPTS = ["a striped red star", "a striped red star", "two blue circles", "two blue circles"]
# file, what is asked, width and height in pixels, answers given before the picture is taken
PICTURES = [("rating_phone", "score", 390, 720, 1), ("rating_desktop", "pairs", 960, 760, 0)]
OUT = pathlib.Path(__file__).parent / "img"


@contextlib.contextmanager
def page(mode: str):
    """The URL of a page on which a batch waits to be rated."""
    scenes = world.scenes_for([world.parse(prompt) for prompt in PROMPTS], np.random.default_rng(4))
    with tempfile.TemporaryDirectory() as folder:
        queue = Queue(pathlib.Path(folder), mode, 0, 60.0)
        server = app.serve(queue, host="127.0.0.1", port=0, token="", flag="")

        def rate() -> None:
            with contextlib.suppress(Stopped):
                queue.rate(world.render_all(scenes), PROMPTS, "")

        thread = threading.Thread(target=rate)
        thread.start()
        try:
            yield app.address(server)
        finally:
            queue.close()
            thread.join()
            server.close()


def browser() -> webdriver.Chrome:
    """A browser without a window, on its own fonts and light colours."""
    os.environ["SE_OFFLINE"] = os.environ["SE_AVOID_STATS"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def photograph(driver: webdriver.Chrome, name: str, mode: str, width: int, height: int, answers: int) -> None:
    """Writes one picture."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with page(mode) as url:
        driver.get(url)
        wait(driver, "typeof ready !== 'undefined' && ready && task !== null")
        for _ in range(answers):
            before = driver.execute_script("return task.id")
            driver.find_element("css selector", "body").send_keys("4")
            wait(driver, f"task !== null && task.id !== '{before}' && ready")
        time.sleep(0.5)  # the bar of progress glides
        path = OUT / f"{name}.png"
        driver.save_screenshot(str(path))
    with Image.open(path) as shot:
        shot.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size} bytes")


def wait(driver: webdriver.Chrome, script: str) -> None:
    """Until a line of JavaScript is true, for a minute at most."""
    deadline = time.monotonic() + 60
    while not driver.execute_script(f"return {script}"):
        if time.monotonic() > deadline:
            raise TimeoutError(script)
        time.sleep(0.05)


def main() -> None:
    """Writes all of them."""
    driver = browser()
    try:
        for picture in PICTURES:
            photograph(driver, *picture)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
