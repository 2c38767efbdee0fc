"""``ddpo_jax score``: image files of every kind to a table or JSON, and what it says of wrong input."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import score as command
from ddpo_jax.mini import world
from ddpo_jax.studies import score

ROOT = pathlib.Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(3)
RED = (200, 30, 10)
MINE = """
import numpy as np
seen = []

def mean(images, prompts, metadata):
    print("noise of a reward")
    seen.extend(zip(prompts, metadata))
    long = [np.nan if len(prompt) < 5 else 1.0 for prompt in prompts]
    return images.mean((1, 2, 3)), {"red": images[..., 0].mean((1, 2)), "long": long}

def broken(images, prompts, metadata):
    raise OSError("no network")

def strict(images, prompts, metadata):
    from ddpo_jax.errors import InputError
    raise InputError("I read no such picture")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures and a module of the user's own, as ``score_mine``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "score_mine", raising=False)
    (tmp_path / "score_mine.py").write_text(MINE)
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("noise.png")
    Image.new("RGB", (512, 512)).save("black.png")
    return tmp_path


def answer(capsys, *argv):
    """What the command prints as JSON."""
    assert cli.run(command.main, [*argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv, code=2):
    """The lines of a command that fails."""
    assert cli.run(command.main, argv) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_the_jpeg_anchor_as_a_table(here, capsys):
    """A black image of 512 x 512 is 4.723 kB (Black et al. 2023)."""
    assert cli.run(command.main, ["--reward=jpeg_compressibility", "--prompt=x", "black.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "           jpeg_compressibility  jpeg_compressibility/jpeg_kb",
        "black.png  -4.723                4.723",
    ]


def kilobytes(name):
    buffer = io.BytesIO()
    Image.open(name).convert("RGB").save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_several_rewards_sizes_and_the_mean(here, capsys):
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("other.png")
    names = ["noise.png", "black.png", "other.png"]  # the first and the last go to a reward together
    found = answer(capsys, "--reward=jpeg_incompressibility,score_mine:mean", "--prompt=a cat", *names)
    assert [image["file"] for image in found["images"]] == names
    for name, image in zip(names, found["images"], strict=True):
        pixels = np.asarray(Image.open(name), np.float64)
        assert image["prompt"] == "a cat"
        assert image["scores"]["jpeg_incompressibility"] == pytest.approx(kilobytes(name), rel=1e-6)
        assert image["scores"]["score_mine:mean"] == pytest.approx(pixels.mean(), rel=1e-5)
        assert image["scores"]["score_mine:mean/red"] == pytest.approx(pixels[..., 0].mean(), rel=1e-5)
    mean = np.mean([kilobytes(name) for name in names])
    assert found["mean"]["jpeg_incompressibility"] == pytest.approx(mean, rel=1e-6)
    assert cli.run(command.main, ["--reward=jpeg_incompressibility", "--prompt=x", *names]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"mean of 3  {mean:.6g}")


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_more_images_than_are_read_at_once(here, capsys, monkeypatch, chunk):
    monkeypatch.setattr(score, "CHUNK", chunk)
    for level in range(5):
        Image.new("RGB", (8 + level % 2, 8), (level,) * 3).save(f"{level}.png")
    found = answer(capsys, "--reward=score_mine:mean", "--prompt=a cat", *(f"{level}.png" for level in (4, 0, 3, 1, 2)))
    assert [image["scores"]["score_mine:mean"] for image in found["images"]] == [4, 0, 3, 1, 2]


def test_what_a_reward_prints_is_no_result(here, capsys):
    assert cli.run(command.main, ["--reward=score_mine:mean", "--prompt=cat", "black.png"]) == 0
    printed = capsys.readouterr()
    assert "noise of a reward" in printed.err and "noise" not in printed.out
    assert printed.out.splitlines()[1].split() == ["black.png", "0", "0", "-"]  # a part that says nothing of it


def test_every_mode_is_converted_as_pillow_does(here, caplog):
    """The published code calls ``Image.open(path).convert("RGB")``: no rotation by EXIF, no blending by alpha."""
    base = Image.fromarray(RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    base.convert("L").save("gray.png")
    base.convert("1").save("bits.png")
    base.convert("P").save("palette.png")
    base.convert("CMYK").save("cmyk.jpg")
    alpha = base.copy()
    alpha.putalpha(Image.fromarray(RNG.integers(0, 256, (12, 20), dtype=np.uint8)))
    alpha.save("alpha.png")
    base.save("moving.gif", save_all=True, append_images=[Image.new("RGB", base.size)])
    turned = Image.Exif()
    turned[0x0112] = 6
    base.save("turned.jpg", exif=turned)
    names = ["gray.png", "bits.png", "palette.png", "cmyk.jpg", "alpha.png", "moving.gif", "turned.jpg"]
    for name in names:
        want = np.asarray(Image.open(name).convert("RGB"))
        assert want.shape == (12, 20, 3)
        np.testing.assert_array_equal(score.read_image(pathlib.Path(name)), want)
    assert cli.run(command.main, ["--reward=jpeg_compressibility", "--prompt=x", *names]) == 0
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["turned.jpg: its EXIF rotation is not applied, as in the published scores"]


def test_options_for_all_for_one_and_for_whom_they_are(here, capsys):
    """The miniature's CLIP score of the miniature's own pictures: 100 cosine is a hundred times the cosine."""
    caption = "a red circle"
    picture = world.render_all(world.scenes_for([world.parse(caption)], np.random.default_rng(0)))[0]
    Image.fromarray(picture).save("mini.png")
    rewards = "clip_score,clip_score[scale=1],jpeg_compressibility,mini_verifier"
    found = answer(
        capsys, f"--reward={rewards}", "--reward.scale=100", "--reward.batch_size=2", f"--prompt={caption}", "mini.png"
    )
    scores = found["images"][0]["scores"]
    assert scores["clip_score"] == pytest.approx(100 * scores["clip_score[scale=1]"], rel=1e-5)
    assert scores["clip_score[scale=1]"] == pytest.approx(scores["clip_score[scale=1]/clip_cosine"], rel=1e-6)
    assert scores["mini_verifier"] > 0.9  # what the caption names is drawn
    told = found["rewards"]
    assert (told["clip_score"]["weights"], told["clip_score"]["scale"], told["clip_score"]["batch_size"]) == (
        "mini", "100", 2)  # fmt: skip
    assert told["clip_score[scale=1]"]["scale"] == "1" and told["jpeg_compressibility"] == {}


def test_the_published_weights_are_meant_for_images_of_any_other_size(here, capsys):
    """Not the miniature's because the machine is a CPU, as in training."""
    (line,) = refused(capsys, "--reward=aesthetic", f"--reward.head={here / 'none.pth'}", "--prompt=x", "noise.png")
    assert "none.pth" in line
    shapes = [(32, 32), (32, 32)]
    assert score.is_miniature(shapes) and not score.is_miniature([*shapes, (32, 40)])


def test_a_csv_beside_its_images(here, capsys):
    folder = here / "images"
    (folder / "a").mkdir(parents=True)
    for name in ("one.png", "a/two.png"):
        Image.new("RGB", (8, 8), RED).save(folder / name)
    rows = b'\xef\xbb\xbffile,prompt,count\r\none.png,"a cat, a dog",2\r\n\r\na/two.png,"say ""hi""",1\r\n'
    (folder / "prompts.csv").write_bytes(rows)
    found = answer(capsys, "--reward=score_mine:mean", f"--prompts={folder / 'prompts.csv'}")
    assert [image["file"] for image in found["images"]] == [str(folder / "one.png"), str(folder / "a/two.png")]
    assert sys.modules["score_mine"].seen == [("a cat, a dog", {"count": "2"}), ('say "hi"', {"count": "1"})]


def test_a_jsonl_with_metadata(here, capsys):
    lines = [{"file": "noise.png", "prompt": "a cat", "chunks": ["a cat"]}, {"caption": "a dog", "file": "noise.png"}]
    pathlib.Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answer(capsys, "--reward=score_mine:mean", "--prompts=prompts.jsonl")
    assert sys.modules["score_mine"].seen == [("a cat", {"chunks": ["a cat"]}), ("a dog", {})]


def damaged(name, length):
    """The first bytes of a picture of noise."""
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, pathlib.Path(name).suffix[1:])
    pathlib.Path(name).write_bytes(buffer.getvalue()[:length])


def test_files_that_are_no_images_are_a_line_each(here, capsys):
    damaged("cut.png", 3000)
    damaged("cut.jpeg", 2000)
    pathlib.Path("text.png").write_text("<html>not found</html>")
    pathlib.Path("empty.png").write_bytes(b"")
    pathlib.Path("code.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.new("I;16", (8, 8)).save("deep.png")
    pathlib.Path("folder.png").mkdir()
    cases = {
        "cut.png": "it is no whole image",
        "cut.jpeg": "it is no whole image: OSError: image file is truncated",
        "text.png": "it is no image; use BMP, GIF",
        "empty.png": "it is no image",
        "code.eps": "it is no image",  # whose reader would start Ghostscript
        "deep.png": "colour mode I;16",
        "folder.png": "it is a folder",
        "none.png": "there is no such file",
    }
    lines = refused(capsys, "--reward=no_such_reward_is_even_looked_for", "--prompt=x", "black.png", *cases)
    assert len(lines) == len(cases)
    for line, (name, fault) in zip(lines, cases.items(), strict=True):
        assert line.startswith(f"error: {name}: ") and fault in line, line


def test_an_image_that_would_fill_the_memory(here, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (line,) = refused(capsys, "--reward=jpeg_compressibility", "--prompt=x", "noise.png")
    assert "noise.png: it is too large; at most 1000 pixels" in line


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.jsonl", b'{"file": "noise.png", "prompt": "a"}\n{"file": \n', "line 2 is not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON that can be read"),
        ("p.jsonl", b"null", "line 1 is a JSON NoneType"),
        ("p.jsonl", b'{"file": "noise.png"}', "line 1 has no prompt"),
        ("p.jsonl", b'{"prompt": "a"}', "line 1 names no image; give it as file"),
        ("p.jsonl", b'{"prompt": "a", "file": 3}', "line 1 names no image"),
        ("p.jsonl", b'{"prompt": " ", "file": "noise.png"}', "line 1 is empty; a prompt needs at least one word"),
        ("p.jsonl", b"\xff\xfe", "byte 0 is not UTF-8 text"),
        ("p.csv", b"", "the file has no prompts"),
        ("p.csv", b"name,caption\na,b\n", "its first line has no column file and no prompt; begin with file,prompt"),
        ("p.csv", b"file,prompt\nnoise.png,a cat, a dog\n", "line 2 does not have the 2 values"),
        ("p.csv", b"file,prompt\n\nnoise.png\n", "line 3 does not have the 2 values"),
        ("p.csv", b'file,prompt\nnoise.png,"a" b\n', "line 2 is broken"),
        ("p.csv", b'file,prompt\nnoise.png,"a\n', "line 2 is broken"),
        ("p.csv", b"file,prompt\nnoise.png,\n", "line 2 is empty; a prompt needs"),
        ("p.csv", b"file,prompt\n,a cat\n", "line 2 names no image"),
        ("p.csv", b"file,prompt\n", "it names no image; write one a line"),
    ],
)
def test_broken_files_of_prompts(here, capsys, name, content, fault):
    pathlib.Path(name).write_bytes(content)
    (line,) = refused(capsys, "--reward=jpeg_compressibility", f"--prompts={name}")
    assert line.startswith(f"error: --prompts: received {name!r}; ") and fault in line, line


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--prompt=x", "black.png"], "required: --reward"),
        (["--reward=jpeg_compresibility", "--prompt=x", "black.png"], "Did you mean 'jpeg_compressibility'"),
        (["--reward=,", "--prompt=x", "black.png"], "it must name a reward"),
        (["--reward=clip_score[scale=1", "--prompt=x", "black.png"], "it must be name or name[option=value,...]"),
        (["--reward=clip_score", "--reward.scael=1", "--prompt=x", "black.png"], "nearest is 'reward.scale'"),
        (["--reward=clip_score", "--reward.scale", "--prompt=x", "black.png"], "--reward.scale: received no value"),
        (["--reward=clip_score", "--reward.batch_size=x", "--prompt=x", "black.png"], "it must be a whole number"),
        (["--reward=jpeg_compressibility", "black.png"], "every image is scored for a prompt"),
        (["--reward=jpeg_compressibility", "--prompt=x", "--prompts=p.csv"], "every image is scored for a prompt"),
        (["--reward=jpeg_compressibility", "--prompt= ", "black.png"], "--prompt: received ' '; it is empty"),
        (["--reward=jpeg_compressibility", "--prompt=x"], "IMAGE: received no file"),
        (["--reward=jpeg_compressibility", "--prompts=p.csv", "black.png"], "IMAGE: received 'black.png' with"),
        (["--reward=jpeg_compressibility", "--prompts=none.csv"], "there is no such file"),
        (["--reward=jpeg_compressibility", "--prompts="], "--prompts: received ''; it must be a CSV or .jsonl file"),
        (["--reward=jpeg_compressibility", "--prompt=x", "--model=nowhere", "black.png"], "model: received 'nowhere'"),
        (["--reward=score_mine:strict", "--prompt=x", "black.png"], "I read no such picture"),
        (["--reward=mini_verifier", "--model=mini", "--prompt=x", "black.png"], "it reads uint8 [N, 32, 32, 3]"),
    ],
)
def test_wrong_input_is_one_line(here, capsys, argv, fault):
    (line,) = refused(capsys, *argv)
    assert fault in line, line


def test_a_reward_that_fails_is_a_failure(here, capsys):
    (line,) = refused(capsys, "--reward=score_mine:broken", "--prompt=x", "black.png", code=1)
    assert "reward 'score_mine:broken' raised OSError: no network" in line


def test_a_reward_that_serves_is_closed(here, capsys, monkeypatch):
    class Patient:
        closed = 0

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

        def close(self):
            Patient.closed += 1

    monkeypatch.setattr(command, "make_reward", lambda section, member: Patient())
    answer(capsys, "--reward=jpeg_compressibility,jpeg_incompressibility", "--prompt=x", "black.png")
    assert Patient.closed == 2


def test_as_a_process_only_the_result_is_on_standard_output(here):
    argv = [sys.executable, "-m", "ddpo_jax", "score", "--prompt=x", "black.png", "--reward=jpeg_compressibility"]
    done = subprocess.run(
        argv, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr
    assert "1 of 1 images" in done.stderr
