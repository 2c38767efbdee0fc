"""``ddpo_jax serve``: what it serves, how it ends, what it says of wrong input."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import http_tools
import numpy as np
import pytest
from http_tools import ask, png

from ddpo_jax.commands import serve
from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import jpeg as _jpeg

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(7).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
BODY = {"prompt": ["a", "b"], "image": [png(image) for image in IMAGES]}


def serving(*argv, cwd=ROOT):
    """The command in a process of its own, and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpo_jax", "serve", "--port=0", *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    return process, line.strip()


def test_a_function_of_ones_own_and_a_clean_end(tmp_path):
    """SIGTERM while a request is computed: it is answered, then the process ends with 143 and no traceback."""
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def slow(images, prompts, metadata):\n"
        "    time.sleep(1)\n"
        "    return images.mean((1, 2, 3)), {'n': [float(m.get('n', 'nan')) for m in metadata]}\n"
    )
    process, line = serving("--reward=mine:slow", cwd=tmp_path)
    assert line.startswith("serving mine:slow at http://127.0.0.1:"), (line, process.stderr.read())
    url, replies = line.split()[-1], []
    assert ask(f"{url}/health")[2]["reward"] == "mine:slow"
    body = BODY | {"metadata": [{"n": 3}, {}]}
    asking = threading.Thread(target=lambda: replies.append(ask(f"{url}/compute", "POST", body)))
    asking.start()
    while not ask(f"{url}/health")[2]["requests"]:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    asking.join(60)
    assert (process.returncode, output) == (143, "")
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
    status, _, reply = replies[0]
    assert status == 200 and reply["parts"] == {"n": [3.0, None]}
    np.testing.assert_allclose(reply["rewards"], IMAGES.mean((1, 2, 3)), rtol=1e-6)


def test_a_member_with_a_token_and_sigint():
    process, line = serving("--reward=jpeg_compressibility", "--token=secret")
    url = line.split()[-1]
    assert ask(f"{url}/compute", "POST", BODY)[0] == 401
    status, _, reply = ask(f"{url}/compute", "POST", BODY, {"Authorization": "Bearer secret"})
    assert status == 200
    np.testing.assert_array_equal(np.float32(reply["rewards"]), -_jpeg.kilobytes(IMAGES))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --reward"),
        (["--reward=jpeg_compresibility"], "Did you mean 'jpeg_compressibility'"),
        (["--reward=no_such_module_xyz:f"], "there is no module 'no_such_module_xyz'"),
        (["--reward=clip_score", "--option", "scale"], "--option: received 'scale'; it must be key=value"),
        (["--reward=clip_score", "--option", "scales=100"], "nearest is 'reward.scale'"),
        (["--reward=clip_score", "--option", "scale=7"], "reward.scale='7'"),
        (["--reward=jpeg_compressibility", "--port=x"], "--port: invalid int value: 'x'"),
        (["--reward=jpeg_compressibility", "--port=99999"], "--port: received 99999"),
        (["--reward=jpeg_compressibility", "--queue=0"], "--queue: received '0'"),
        (["--reward=jpeg_compressibility", "--host=0.0.0.0"], "--host: received '0.0.0.0' without a token; .*--token="),
    ],
)
def test_wrong_input_is_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        serve.main(argv)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_one_line():
    with http_tools.served(lambda *_: None) as server:
        with pytest.raises(InputError, match=rf"--port: received {server.port}; another program on this machine"):
            serve.main(["--reward=jpeg_compressibility", f"--port={server.port}"])


def test_options_reach_the_reward():
    section, _ = serve.reward_config("clip_score", ["scale=100", "batch_size=3"], "mini")
    assert (section.scale, section.batch_size, section.weights) == ("100", 3, "mini")
    assert serve.reward_config("clip_score", [], "CompVis/stable-diffusion-v1-4")[0].weights == "B/32"
