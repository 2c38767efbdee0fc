"""The benchmark end to end on a tiny model, its refusals, and its counts against sums done by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import benchmark as command_line
from ddpo_jax.config import default_config
from ddpo_jax.config.resolve import resolve
from ddpo_jax.perf import benchmark, capacity, liveness
from ddpo_jax.perf.random_model import SIZES, Size

TINY = Size(tiny.UNET, tiny.VAE, text_params=1000, tokens=6, prediction_type="v_prediction")
FEW = ["--model=tiny", "--steps=2", "--batch=8", "--repeats=1", "--set=prompts.samples_per_prompt=2", "--json"]


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


def command(*argv):
    return cli.run(command_line.main, argv)


@pytest.mark.slow
def test_random_weights_run_and_every_number_is_positive(sizes, capsys):
    faster = ["--set=train.remat=off", "--set=train.recompute_log_prob=off"]  # to compile
    assert command(*FEW, *faster, "--random-weights") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in result["rows"]}
    assert result["dtype"] == "bfloat16" and result["adapter rank"] == 4
    assert all(np.isfinite(row["value"]) and row["value"] > 0 for row in rows.values())
    names = "\n".join(rows)
    for part in ("rollout, per sample-step", "timestep_fraction 0.4, per", "compiles", "operations", "memory, host"):
        assert part in names
    # 8 images of 2 steps: milliseconds per sample-step and images per second are the same measurement
    per_step, rate = rows["rollout, per sample-step"]["value"], rows["rollout, with decoding"]["value"]
    assert per_step == pytest.approx(1e3 / (2 * rate))
    assert rows["rollout, first run (compiles)"]["value"] > 8 / rate


def test_memory_only_counts_what_is_resident_and_prints_a_table(sizes, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "REMAT", ("off",))
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(TINY, unet=tiny.SMALLEST_UNET))
    asked = [*FEW[:-1], "--memory-only"]
    assert command(*asked, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "adapters of rank 4, remat off: on paper"  # progress
    rows = {row["what"]: row["value"] * 2**30 for row in json.loads(printed.out)["rows"]}
    whole = {name: value for name, value in rows.items() if name.startswith("whole UNet, remat off")}
    resident = whole["whole UNet, remat off: resident"]
    count = sum(np.prod(s) for s in _shapes(tiny.SMALLEST_UNET))
    vae = sum(np.prod(s) for s in _shapes(tiny.VAE))
    # float32 parameters and AdamW's two moments, two counters; the VAE and the text encoder
    assert resident == pytest.approx(4 * (3 * count + vae + TINY.text_params), abs=64)
    assert all(value > resident for name, value in whole.items() if "resident" not in name)
    assert rows["adapters of rank 4, remat off: resident"] < resident
    assert "(fits H100, A100, TPU v4, TPU v5e)" in "".join(rows)

    entries = [
        capacity.Memory("small", 2**30, 2**31, 2**30, 2**31, 2**30, 2**30),
        capacity.Memory("large", 2**30, 2**30, 2**30, 20 * 2**30, 3 * 2**30, 4 * 2**30, "TPU v5e"),
    ]
    table = benchmark.memory_table(entries, "v5e").splitlines()
    assert table[3].startswith("| large | 1.0 | 1.0 | 1.0 | 20.0 | 3.0 | 4.0 |")
    assert table[3].endswith("| yes | yes | yes | yes |")  # by its own compiler the last; 20 of 32 GiB the one before


def test_memory_only_compiles_a_rollout_once_for_both_kinds_of_remat(sizes, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(TINY, unet=tiny.SMALLEST_UNET))
    made = iter(range(1, 100))
    monkeypatch.setattr(capacity, "compiled", lambda program, args, platform: (next(made) * 2**30, ""))
    monkeypatch.setattr(capacity, "paper_bytes", lambda traced: 0)
    assert command(*FEW, "--memory-only", "--compile-for=here") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    compiled = [int(row["value"]) for row in rows if ": compiled" in row["what"]]  # what is resident is not a GiB
    assert compiled == [1, 2, 1, 3, 4, 5, 4, 6]  # rollout, update; with remat, without; adapters, whole UNet


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded", 17.5),
        (
            "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) "
            "exceeds available HBM (15.75G). HLO module: jit__update.",
            0.5,
        ),
        ("INTERNAL: Mosaic failed to compile 3.00G of kernels", None),
    ],
)
def test_refusal_of_a_tpu_compiler_says_how_much(message, gib):
    assert capacity.refused_bytes(message) == (gib and gib * 2**30)


@pytest.mark.slow  # compiles four programs
def test_memory_only_asks_the_compiler(sizes, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "REMAT", ("on",))
    assert command(*FEW, "--memory-only", "--compile-for=here") == 0
    rows = {row["what"]: row["value"] * 2**30 for row in json.loads(capsys.readouterr().out)["rows"]}
    assert sum("compiled" in name for name in rows) == 4 and all(value > 0 for value in rows.values())


def _paper(function, *shapes, **options):
    return liveness.paper_bytes(
        jax.jit(function, **options).trace(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    )


def test_memory_on_paper_by_hand():
    n = 4 * 64 * 64  # bytes of one array
    square = (64, 64)
    # Two products: the first result is held until the second is there.
    assert _paper(lambda x: x @ x @ x, square) == 2 * n
    # Elementwise work between them writes over its operand; before a sum it is not even written.
    assert _paper(lambda x: jax.nn.relu(jnp.sin(x @ x) + 1) @ x, square) == 2 * n
    assert _paper(lambda x: jnp.square(x @ x + 1).sum(), square) == n + 4
    # A donated argument is written over.
    assert _paper(lambda x: x + 1, square) == n
    assert _paper(lambda x: x + 1, square, donate_argnums=0) == 0
    # A loop holds its carry once and the temporaries of one turn, whatever its length.
    for length in (2, 20):
        loop = lambda x, length=length: jax.lax.scan(lambda c, _: (c + x @ x, None), x, length=length)[0]  # noqa: E731
        assert _paper(loop, square) == 2 * n

    def layers(x, w, wrap):
        for _ in range(8):
            x = wrap(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x)
        return x.sum()

    plain, remat = (
        _paper(lambda x, w, wrap=wrap: jax.grad(layers)(x, w, wrap), square, square)
        for wrap in (lambda f: f, jax.checkpoint)
    )
    assert plain >= 16 * n and 8 * n <= remat <= 13 * n  # two products a layer are held, or the layer's input alone


def _shapes(config):
    from ddpo_jax.models import keys
    from ddpo_jax.models.unet import UNet2DCondition
    from ddpo_jax.models.vae import AutoencoderKL

    return keys.upstream_shapes(
        keys.abstract(AutoencoderKL if config is tiny.VAE else UNet2DCondition, config)
    ).values()


@pytest.mark.slow
def test_the_work_of_training_everything_is_three_forwards_and_of_adapters_two():
    config = default_config()
    config.model = "tiny"
    work = {}
    for rank in (0, 1):
        config.train.lora_rank = rank
        work[rank] = capacity.work(resolve(config, "cpu")[0], TINY)
    assert work[0].update_step / work[0].rollout_step == pytest.approx(3, rel=0.1)
    assert 1.8 < work[1].update_step / work[1].rollout_step < 2.6
    config.sample.guidance_scale = 1.0
    once = capacity.work(resolve(config, "cpu")[0], TINY)
    assert once.rollout_step == pytest.approx(work[1].rollout_step / 2, rel=0.01)


def test_sizes_are_the_published_ones():
    """Parameters of the UNet: 859 520 964 and 865 910 724 (model cards of Stable Diffusion 1.5 and 2.1)."""
    assert sum(np.prod(s) for s in _shapes_of(SIZES["sd15"])) == 859_520_964
    assert sum(np.prod(s) for s in _shapes_of(SIZES["sd21"])) == 865_910_724


def _shapes_of(size):
    from ddpo_jax.models import keys
    from ddpo_jax.models.unet import UNet2DCondition

    return keys.upstream_shapes(keys.abstract(UNet2DCondition, size.unet)).values()


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v4", 275),
        ("cpu", None),
    ],
)
def test_peaks(kind, teraflops):
    assert capacity.peak_flops(kind) == (teraflops and teraflops * 1e12)


def test_loop_compares_two_rules_and_puts_the_first_back(capsys):
    from ddpo_jax.models import layers

    rule = layers.conv
    rows = benchmark.loop_rows(1, channels=8, size=4, images=2, length=2)
    assert layers.conv is rule
    assert [unit for *_, unit in rows] == ["ms", "ms", "ms", "x"] and all(value > 0 for _, value, _ in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model=sd15"], "add --random-weights"),
        (["--model=sd15", "--random-weights"], "--steps must be at most 2"),
        (["--model=mini", "--random-weights"], "it must be one of sd15, sd21"),
        (["--set=train.lora_rank"], "--set: received 'train.lora_rank'"),
        (["--set=train.lora_ranks=1"], "unknown key 'train.lora_ranks'"),
        (["--repeats=0"], "--repeats"),
        (["--model=nowhere"], "no such folder"),
        (["--model=sd15", "--memory-only", "--compile-for=gpu"], "--compile-for: invalid choice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, argv, message):
    assert command(*argv) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
