"""The benchmark of rewards: every reward reads the files that are made for it, and what the numbers mean."""

import dataclasses
import types

import numpy as np
import pytest

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import benchmark as command_line
from ddpo_jax.models import clip, deberta
from ddpo_jax.perf import benchmark, random_rewards
from ddpo_jax.rewards import hps, pickscore
from ddpo_jax.rewards._shared.clip import Published

TEXT = dict(hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=1, num_attention_heads=2)
SMALL = clip.CLIPConfig(
    clip.CLIPTextConfig(**TEXT, vocab_size=700),
    clip.CLIPVisionConfig(**TEXT, image_size=32, patch_size=16),
    projection_dim=16,
)


@pytest.fixture
def small(monkeypatch):
    """Networks of a few thousand parameters in place of the published ones."""
    monkeypatch.setattr(random_rewards, "SIDE", 48)
    monkeypatch.setattr(random_rewards, "BATCH", 4)
    monkeypatch.setattr(random_rewards, "CLIPS", dict.fromkeys(random_rewards.CLIPS, SMALL))
    for name, (cls, config, file) in random_rewards.BLIPS.items():
        vision = dataclasses.replace(config.vision, image_size=32, hidden_size=64, intermediate_size=64)
        text = dataclasses.replace(config.text, vocab_size=300, hidden_size=64, context_size=64, intermediate_size=64)
        vision, text = (dataclasses.replace(x, num_hidden_layers=1, num_attention_heads=1) for x in (vision, text))
        monkeypatch.setitem(random_rewards.BLIPS, name, (cls, type(config)(vision, text), file))
    encoder = deberta.DebertaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    monkeypatch.setattr(random_rewards, "ENCODER", encoder)
    monkeypatch.setattr(pickscore, "PUBLISHED", Published("pickscore", SMALL))
    monkeypatch.setitem(hps.VERSIONS, "v2.1", Published("hps_v2_1", SMALL))


@pytest.mark.parametrize("name", random_rewards.FILES)
def test_every_reward_reads_its_files_and_is_timed_on_the_whole_batch(small, monkeypatch, name):
    scored = []

    def timed(function, repeats):
        scored.append(function())
        assert repeats == 3
        return 7.0, 0.5

    monkeypatch.setattr(random_rewards, "median_time", timed)
    rows = list(random_rewards.speed([name], 3))
    assert rows == [(f"{name}, 4 images of 48 x 48", 8.0, "images/s"), (f"{name}, first call (compiles)", 7.0, "s")]
    ((scores, _),) = scored
    assert scores.shape == (4,) and len(set(scores.tolist())) == 4  # of noise: each image has its own


def test_the_sizes_are_the_published_ones():
    """Parameters of CLIP L/14, B/32 and H/14."""
    from ddpo_jax.models import keys

    counts = {
        name: sum(int(np.prod(shape)) for shape in keys.upstream_shapes(keys.abstract(clip.CLIP, config)).values())
        for name, config in random_rewards.CLIPS.items()
    }
    wanted = {"aesthetic": 427_616_513, "clip_score": 151_277_313, "hps": 986_109_441, "pickscore": 986_109_441}
    assert counts == wanted


def test_the_share_of_an_epoch_that_waits(monkeypatch):
    """Waits of 30, 10, 20 and 90 ms in epochs of 0.2 s: the first is left out, and the median of the others is 20."""
    waits = iter([0.03, 0.01, 0.02, 0.09])
    seen = []

    def collect(epoch, params):
        seen.append((epoch, params))
        return types.SimpleNamespace(reward_s=next(waits), prompts=["a"] * 32)

    def timed(function, repeats):
        for _ in range(repeats + 1):
            function()
        return 9.0, 0.2

    monkeypatch.setattr(benchmark, "median_time", timed)
    updated = types.SimpleNamespace(params="trained")
    monkeypatch.setattr(benchmark.epochs, "update", lambda parts, config, state, stats, rollout, epoch: (updated, {}))
    parts = types.SimpleNamespace(collector=types.SimpleNamespace(collect=collect))
    config = types.SimpleNamespace(reward=types.SimpleNamespace(name="jpeg_compressibility"))
    rows = benchmark.epoch_rows(config, parts, types.SimpleNamespace(params="fresh"), 3)
    assert rows == [
        ("whole epoch", 160.0, "reward queries/s"),
        ("whole epoch", 0.2, "s"),
        ("whole epoch, waiting for jpeg_compressibility", pytest.approx(10.0), "%"),
    ]
    assert seen == [(0, "fresh"), (1, "trained"), (2, "trained"), (3, "trained")]


def test_the_command_prints_both(monkeypatch, capsys):
    row = ("whole epoch, waiting for jpeg_compressibility", 1.5, "%")
    monkeypatch.setattr(benchmark, "epoch_rows", lambda config, parts, state, repeats: [row])
    monkeypatch.setattr(random_rewards, "speed", lambda names, repeats: [(name, repeats, "images/s") for name in names])
    assert cli.run(command_line.main, ["--rewards=jpeg_compressibility,aesthetic", "--repeats=2"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["jpeg_compressibility: 2 images/s", "aesthetic: 2 images/s"]  # as they come
    lines = printed.out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["%", "images/s", "images/s"]
    assert "aesthetic" in lines[-1]


def test_all_are_timed_where_no_name_is_given_and_unknown_ones_are_refused(capsys):
    assert random_rewards.check_names("all") == [*random_rewards.FILES]
    assert cli.run(command_line.main, ["--rewards=aestetic"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "received 'aestetic'" in printed and "use aesthetic" in printed
