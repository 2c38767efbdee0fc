"""What chips tell each other: collectives of compiled programs against bytes counted by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from ddpo_jax import sharding
from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import benchmark as command_line
from ddpo_jax.models import keys
from ddpo_jax.models.unet import UNet2DCondition
from ddpo_jax.perf import capacity, topology
from ddpo_jax.perf.random_model import SIZES, Size

# As compilers of CPUs and TPUs write them.
TEXT = """
  %all-gather.1 = f32[8,320]{1,0:T(8,128)} all-gather(f32[1,320]{1,0} %p.1), replica_groups=[1,8]<=[8], dimensions={0}
  %all-reduce.2 = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce(f32[4]{0} %a, bf16[2,2]{1,0} %b), to_apply=%add
  %ag-start = (bf16[4,10]{1,0}, bf16[8,10]{1,0}) all-gather-start(bf16[4,10]{1,0} %p), replica_groups={{0,1},{2,3}}
  %ag-done = bf16[8,10]{1,0} all-gather-done((bf16[4,10]{1,0}, bf16[8,10]{1,0}) %ag-start)
  %rs = f32[10,3]{1,0} reduce-scatter(f32[40,3]{1,0} %x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %cp = (f32[25]{0}, f32[25]{0}, u32[], u32[]) collective-permute-start(f32[25]{0} %y), source_target_pairs={{0,1}}
  %fusion = f32[4]{0} fusion(f32[4]{0} %all-reduce.2), kind=kLoop, calls=%all-gather.fused
"""


def test_bytes_of_a_text_by_hand():
    assert topology.collectives(TEXT) == {
        "all-gather": (2, 8 * 320 * 4 + 8 * 10 * 2),
        "all-reduce": (1, 4 * 4 + 2 * 2 * 2),
        "reduce-scatter": (1, 40 * 3 * 4),  # of what it takes
        "collective-permute": (1, 25 * 4),
        "all-to-all": (0, 0),
    }


@pytest.mark.parametrize(
    "kind, work, expected",
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), 1024 * 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 1024 // 4 * 4),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), 1024 // 4 * 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 1024 // 4 * 4),
    ],
)
def test_bytes_of_a_compiled_program(kind, work, expected):
    """Of 1024 float32 numbers each of four devices has a quarter."""
    mesh = sharding.make_mesh(1, 4)
    split = P("fsdp")
    out = P() if kind in ("all-gather", "all-reduce") else split
    program = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=split, out_specs=out, check_vma=False))
    found = topology.collectives(program.lower(jnp.zeros(1024)).compile().as_text())
    assert found == {name: (0, 0) for name in topology.KINDS} | {kind: (1, expected)}


@pytest.fixture
def eight(monkeypatch):
    """The eight devices of the tests stand for a slice."""
    size = Size(tiny.SMALLEST_UNET, tiny.VAE, text_params=1000, tokens=6, prediction_type="v_prediction")
    monkeypatch.setitem(SIZES, "tiny", size)
    monkeypatch.setattr(capacity, "devices_of", lambda name: jax.devices())
    return ["--model=tiny", "--steps=2", "--batch=16", "--memory-only", "--compile-for=v5e-8", "--set=mesh.fsdp=8",
            "--set=train.lora_rank=0", "--set=prompts.samples_per_prompt=1", "--set=train.remat=off"]  # fmt: skip


def test_a_slice_is_asked_for_the_config_as_it_is(eight, monkeypatch, capsys):
    seen = []

    def compiled(program, args, platform):
        params = args[0].params if not seen else args[0]
        seen.append({name: x.sharding.spec for name, x in params.items()})
        return 2**30, TEXT

    monkeypatch.setattr(capacity, "compiled", compiled)
    rule = "--set=mesh.rules=(conv_in.kernel=3)"
    assert cli.run(command_line.main, [*eight, rule]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed if line.startswith("| ")] == [
        "| GiB on one chip",
        "| update, 8 chips, fsdp 8",
        "| rollout, 8 chips, fsdp 8",
    ]
    for specs in seen:  # of the update and of the rollout
        assert {name for name, spec in specs.items() if spec != P()} == {"conv_in.kernel"}
        assert specs["conv_in.kernel"] == P(None, None, None, "fsdp")


@pytest.mark.slow  # compiles two programs
def test_every_split_parameter_is_gathered_once_and_its_gradient_scattered_once(eight, capsys):
    assert cli.run(command_line.main, [*eight, "--set=mesh.rules=(kernel=0)", "--json"]) == 2
    assert "must divide dimension 0" in capsys.readouterr().err
    rule = r"--set=mesh.rules=(attn.*to_q\.kernel=0)"
    assert cli.run(command_line.main, [*eight, rule, "--json"]) == 0
    rows = {row["what"]: row["value"] * 2**30 for row in json.loads(capsys.readouterr().out)["rows"]}
    shapes = _shapes()
    split = sum(4 * np.prod(shape) for name, shape in shapes.items() if "attn" in name and "to_q.kernel" in name)
    assert split > 0 and rows["update: all-gather"] == split == rows["rollout: all-gather"]
    assert rows["update: reduce-scatter"] == split


def _shapes():
    module = keys.abstract(UNet2DCondition, tiny.SMALLEST_UNET)
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in flat}
