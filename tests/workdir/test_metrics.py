"""Accumulators, metrics.jsonl across restarts, image grids, curves, progress."""

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ddpo_jax.ops.running import Max, Mean
from ddpo_jax.workdir import grid, metrics
from ddpo_jax.workdir.metrics import Progress, Writer, read_metrics


def test_a_start_does_not_wait_for_torch():
    """tensorboardX would import it, which takes four seconds."""
    ask = "import sys, ddpo_jax.workdir.events; print(*sorted({'torch', 'tensorflow'} & sys.modules.keys()), '.')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["."]
    kept = "import torch, ddpo_jax.workdir.events, sys; assert sys.modules['torch'] is torch; torch.ones(1)"
    subprocess.run([sys.executable, "-c", kept], check=True)


def test_mean_is_exact_over_unequal_microbatches():
    values = np.arange(10.0)
    parts = [values[:7], values[7:9], values[9:]]  # the mean of the three means would be 6.67
    merged = Mean.of(parts[0]).merge(Mean.of(parts[1])).merge(Mean.of(parts[2]))
    assert float(merged.compute()) == 4.5
    assert float(Mean.of([1.0, np.nan, 4.0], mask=[1, 0, 2]).compute()) == 3.0
    assert float(Mean.of(jnp.ones((2, 3)), mask=jnp.array([[1.0], [0.0]])).count) == 3.0
    assert np.isnan(Mean.of([1.0], mask=[0]).compute())


def test_accumulators_are_pytrees_for_scan():
    def step(carry, x):
        return (carry[0].merge(Mean.of(x)), carry[1].merge(Max.of(x))), None

    x = jax.random.normal(jax.random.key(0), (5, 4))
    zero = (Mean(jnp.zeros(()), jnp.zeros(())), Max(jnp.float32(-jnp.inf)))
    (mean, largest), _ = jax.jit(lambda x: jax.lax.scan(step, zero, x))(x)
    np.testing.assert_allclose(mean.compute(), np.asarray(x, np.float64).mean(), rtol=1e-5)
    assert largest.compute() == np.asarray(x).max()


def row(epoch, reward=1.0):
    return {"epoch": epoch, "reward/mean": reward, "reward_queries": 64 * (epoch + 1)}


def test_rows_survive_and_are_replaced_on_resume(tmp_path):
    assert read_metrics(tmp_path) == []
    with Writer(tmp_path) as writer:
        for epoch in range(4):
            writer.write(row(epoch, np.float32(0.5)))
        writer.write(row(4) | {"x": jnp.float32(0.25), "n": np.int64(3), "bad": float("nan"), "name": "ü"})
        assert [r["epoch"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]  # on disk before close
    last = read_metrics(tmp_path)[-1]
    assert (last["x"], last["n"], last["bad"], last["name"]) == (0.25, 3, None, "ü")

    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "rew')  # power lost
    assert len(read_metrics(tmp_path)) == 5
    with Writer(tmp_path, start_epoch=3) as writer:
        writer.write(row(3, 9.0))
    rows = read_metrics(tmp_path)
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3]
    assert [r["reward/mean"] for r in rows] == [0.5, 0.5, 0.5, 9.0]
    with Writer(tmp_path):  # from the beginning
        assert read_metrics(tmp_path) == []


def test_floats_are_written_with_all_their_digits(tmp_path):
    value = np.float32(0.1)
    with Writer(tmp_path) as writer:
        writer.write({"epoch": 0, "a": value, "b": 1 / 3})
    got = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert np.float32(got["a"]) == value
    assert got["b"] == 1 / 3


@pytest.mark.parametrize("line", ["not json", "[1]", '{"reward": 1}', '{"epoch": "one"}'])
def test_a_foreign_file_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n" + line + "\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


def test_only_scalars(tmp_path):
    with (
        Writer(tmp_path) as writer,
        pytest.raises(ValueError, match=r"metric x: expected a scalar; received float64\[2\]"),
    ):
        writer.write({"epoch": 0, "x": np.zeros(2)})


def tensorboard_records(path):
    """The payloads of a TensorBoard file: length u64, its checksum u32, payload, checksum u32."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield data[position + 12 : position + 12 + length]
        position += 16 + length


def test_tensorboard_and_samples(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with Writer(tmp_path) as writer:
        writer.write(row(2, 0.75))
        path = writer.images(2, images, ["a red circle", "a cat", "two striped squares"], [0.1, 0.2, 0.3])
    assert path == tmp_path / "samples" / "epoch_0002.png"
    assert Image.open(path).size >= (3 * 128, 128)
    assert not list(tmp_path.rglob("*.tmp"))
    (file,) = tmp_path.glob("events.out.tfevents*")
    values = {}
    for record in tensorboard_records(file):
        event = Event.FromString(record)
        values |= {value.tag: (event.step, value) for value in event.summary.value}
    assert values["reward/mean"][0] == 2
    assert values["reward/mean"][1].simple_value == 0.75
    assert values["samples"][1].image.encoded_image_string.startswith(b"\x89PNG")
    assert "epoch" not in values


def test_before_and_after_stand_side_by_side(tmp_path):
    """The later process finds what the earlier one drew; without a picture from before there is no comparison."""
    dark, light = np.zeros((4, 32, 32, 3), np.uint8), np.full((4, 32, 32, 3), 200, np.uint8)
    names = ["a red circle", "a cat", "two striped squares", "a dot"]
    folder = tmp_path / "samples"
    with Writer(tmp_path) as writer:
        writer.fixed(0, dark, names)
    assert [path.name for path in folder.iterdir()] == ["before.png"]
    with Writer(tmp_path, 1) as writer:
        writer.fixed(7, light, names)
    before, after, both = (
        np.asarray(Image.open(folder / f"{name}.png")) for name in ("before", "after", "before_after")
    )
    width = before.shape[1]
    assert both.shape[1] == 2 * width + grid.GAP
    np.testing.assert_array_equal(both[:, :width], before)
    np.testing.assert_array_equal(both[:, -width:], after)
    y, x = grid.GAP + grid.LINE + grid.GAP + 5, grid.GAP + 5  # inside the first tile, below the title
    assert before[y, x].tolist() == [0] * 3 and after[y, x].tolist() == [200] * 3
    assert not list(tmp_path.rglob("*.tmp"))
    with Writer(tmp_path / "other") as writer:
        writer.fixed(7, light, names)
    assert [path.name for path in (tmp_path / "other" / "samples").iterdir()] == ["after.png"]


def test_grid_shows_the_pixels_enlarged_and_the_captions(tmp_path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, :16] = [255, 0, 0]
    images[1, 0, 0] = [1, 2, 3]
    picture = np.asarray(grid.captioned(images, ["left", "right"]))
    gap, size = grid.GAP, 128
    tiles = [picture[gap : gap + size, x : x + size] for x in (gap, gap + size + gap)]
    for tile, image in zip(tiles, images, strict=True):
        np.testing.assert_array_equal(tile, image.repeat(4, 0).repeat(4, 1))
    beneath = picture[gap + size + 2 :]
    for x in (gap, gap + size + gap):
        assert (beneath[:, x : x + size].min(axis=2) < 128).sum() > 20  # dark pixels: the text
    empty = np.asarray(grid.captioned(images, ["", ""]))
    assert (empty[gap + size + 2 :] == 255).all()


def test_long_captions_are_wrapped_within_the_image():
    font = grid.ImageFont.load_default(size=grid.FONT_SIZE)
    text = "a red circle left of a " + "w" * 15
    lines = grid._wrapped(text + "\nreward 1", 128, font)
    assert all(font.getlength(line) <= 128 for line in lines)
    assert "".join(lines[:-1]).replace(" ", "") == text.replace(" ", "")
    assert lines[-1] == "reward 1"
    cut = grid._wrapped("word " * 100 + "\nreward 1", 128, font)
    assert len(cut) == grid.MAX_LINES + 1
    assert cut[-2].endswith("...") and cut[-1] == "reward 1"
    with pytest.raises(ValueError, match="received 1 images and 2 captions"):
        grid.captioned(np.zeros((1, 8, 8, 3), np.uint8), ["a", "b"])


def test_plot_curve(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw))
    )
    rows = [row(epoch, epoch * 0.5) for epoch in range(5)] + [row(5, None)]
    metrics.plot_curve(tmp_path / "reward.png", {"seed 0": rows, "seed 1": rows[:1]})
    (axes,) = drawn[0].axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [(r["reward_queries"], r["epoch"] * 0.5) for r in rows[:5]])
    assert second.get_marker() == "o" and len(second.get_xydata()) == 1  # one point alone would not be seen
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed 0", "seed 1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("reward queries", "reward mean")
    assert Image.open(tmp_path / "reward.png").size == (768, 480)


def test_progress_without_a_terminal_is_one_line_per_epoch(monkeypatch):
    clock = iter([0.0, 60.0, 62.0, 66.0])  # the first epoch compiles
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(total_epochs=100, start=7, stream=stream)
    for epoch in range(7, 10):
        progress.phase("sampling")
        progress.update(row(epoch, 0.12345))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "epoch 8/100  reward 0.1235  queries 512  60 s with compilation",
        "epoch 9/100  reward 0.1235  queries 576  2 s/epoch  ETA 3:02",
        "epoch 10/100  reward 0.1235  queries 640  3 s/epoch  ETA 4:30",
    ]


def test_progress_on_a_terminal_is_a_bar():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        progress = Progress(total_epochs=2, stream=terminal)
        progress.phase("sampling")
        progress.update(row(0, 0.5))
        progress.update(row(1, 0.75))
        progress.close()
        terminal.flush()
        shown = ""
        while select.select([leader], [], [], 0.5)[0]:  # one read may return only a part
            shown += os.read(leader, 65536).decode()
    os.close(leader)
    for part in ("sampling", "2/2", "reward 0.75", "queries 128", "ETA 0:00", "100%"):
        assert part in shown


def test_duration():
    assert [metrics.duration(s) for s in (0, 65.4, 3725)] == ["0:00", "1:05", "1:02:05"]
