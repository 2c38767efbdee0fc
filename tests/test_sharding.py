"""The mesh and where arrays live on it, on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ddpo_jax import sharding

BIG = (128, 256)  # 2^15 elements; smaller than 2^14 is not split


@pytest.fixture
def mesh():
    return sharding.make_mesh(2, 4)


@pytest.mark.parametrize(
    "data, fsdp, shape",
    [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, 4, (2, 4)), (1, 1, (1, 1)), (2, 1, (2, 1)), (1, 8, (1, 8))],
)
def test_meshes(data, fsdp, shape):
    made = sharding.make_mesh(data, fsdp)
    assert (made.shape["data"], made.shape["fsdp"]) == shape
    assert list(made.devices.flat) == jax.devices()[: made.size]


@pytest.mark.parametrize("data, fsdp", [(3, 4), (9, 1), (-1, 3), (-1, 16), (0, 1), (-2, 1), (1, 0), (1, -1)])
def test_meshes_that_do_not_fit_are_refused(data, fsdp):
    with pytest.raises(ValueError, match=f"mesh: received data={data}, fsdp={fsdp}; .*use data=-1, fsdp=1"):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(
    "shape, fsdp, expected",
    [
        (BIG, 4, P(None, "fsdp")),
        (BIG[::-1], 4, P("fsdp")),
        ((3, 3, 64, 32), 4, P(None, None, "fsdp")),
        ((8, 8), 4, P()),  # not worth a gather
        (BIG, 1, P()),
        ((1001, 77), 4, P()),  # nothing that 4 divides
        ((1001, 76), 4, P(None, "fsdp")),
        ((), 4, P()),
    ],
)
def test_a_parameter_is_split_along_its_largest_dimension_that_divides(shape, fsdp, expected):
    assert sharding.param_spec("any.name", shape, fsdp) == expected


NAMES = {"conv_in.kernel": (3, 3, 8, 320), "to_q.kernel": (320, 320), "to_q.bias": (320,), "time.kernel": (8, 640)}


@pytest.mark.parametrize(
    "rules, expected",
    [
        ([".*=largest"], [P(None, None, None, "fsdp"), P(None, "fsdp"), P(), P()]),  # the last are too small
        (["to_q=0"], [P(), P("fsdp"), P("fsdp"), P()]),  # what no rule finds is whole
        (["bias$=none", "to_q=0", ".*=largest"], [P(None, None, None, "fsdp"), P("fsdp"), P(), P()]),
        ([r"^time\.=1", "conv=2"], [P(None, None, "fsdp"), P(), P(), P(None, "fsdp")]),
    ],
)
def test_the_first_rule_that_finds_a_name_decides(mesh, rules, expected):
    rules = sharding.read_rules(rules)
    sharding.check_rules(rules, NAMES, 4)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in NAMES.items()}
    expected = dict(zip(NAMES, expected, strict=True))
    assert sharding.param_specs(params, mesh, rules) == expected
    moments = sharding.param_specs((None, {"mu": params, "count": jnp.int32(0)}), mesh, rules)[1]
    assert moments == {"mu": expected, "count": P()}
    placed = sharding.put_params({"to_q.bias": jnp.arange(320.0)}, mesh, rules)["to_q.bias"]
    assert placed.addressable_shards[0].data.shape == ((80,) if "fsdp" in expected["to_q.bias"] else (320,))


@pytest.mark.parametrize(
    "rules, message",
    [
        (["to_q.kernl=0"], "received 'to_q.kernl=0', which finds no .*; nearest: to_q.kernel, .*; correct it"),
        ([".*=largest", "to_q=0"], "received 'to_q=0', which finds no parameter's name that rules before it leave"),
        (["conv_in=0"], r"mesh.fsdp=4 must divide dimension 0 of conv_in.kernel \[3, 3, 8, 320\]; use another"),
        (["to_q=1"], r"must divide dimension 1 of to_q.bias \[320\]"),
        (["to_q"], "received 'to_q'; it must be PATTERN=WHERE"),
        (["to_q=widest"], "received 'to_q=widest'; it must be PATTERN=WHERE"),
        (["(=0"], r"received '\(=0'; it must be PATTERN=WHERE"),
    ],
)
def test_rules_that_do_nothing_or_cannot_be_are_refused(rules, message):
    with pytest.raises(ValueError, match=message) as raised:
        sharding.check_rules(sharding.read_rules(rules), NAMES, 4)
    assert str(raised.value).startswith("mesh.rules: ") and "\n" not in str(raised.value)


def test_parameters_at_rest(mesh):
    params = {"big": jnp.arange(128 * 256, dtype=jnp.float32).reshape(BIG), "small": jnp.ones(7)}
    placed = sharding.put_params(params, mesh)
    for name in params:
        np.testing.assert_array_equal(placed[name], params[name])
    assert {shard.data.shape for shard in placed["big"].addressable_shards} == {(128, 64)}
    assert {shard.data.shape for shard in placed["small"].addressable_shards} == {(7,)}
    assert len(placed["big"].addressable_shards) == 8


def test_parameters_of_a_traced_program_may_be_for_devices_that_are_elsewhere(mesh, monkeypatch):
    """As when a compiler is asked about chips that are not there."""
    monkeypatch.setattr(jax.sharding.NamedSharding, "is_fully_addressable", property(lambda where: False))
    shapes = {"big": jax.ShapeDtypeStruct(BIG, jnp.float32)}
    made = jax.eval_shape(lambda params: sharding.put_params(params, mesh), shapes)
    assert made["big"].shape == BIG


def test_samples_are_split_over_both_axes_in_order(mesh):
    placed = sharding.put_batch({"x": np.arange(16), "y": np.zeros((8, 3))}, mesh)
    order = {shard.device: shard.data.tolist() for shard in placed["x"].addressable_shards}
    assert [order[device] for device in mesh.devices.flat] == [[2 * i, 2 * i + 1] for i in range(8)]
    assert {shard.data.shape for shard in placed["y"].addressable_shards} == {(1, 3)}


def test_replicated_arrays_are_whole_everywhere(mesh):
    placed = sharding.replicate({"x": jnp.arange(3)}, mesh)["x"]
    assert [shard.data.tolist() for shard in placed.addressable_shards] == [[0, 1, 2]] * 8


def test_gather_gives_every_device_the_whole_parameters(mesh):
    params = {"big": jnp.arange(128 * 256, dtype=jnp.float32).reshape(BIG), "small": jnp.arange(5.0)}
    specs = sharding.param_specs(params, mesh)

    def whole(params):
        return jax.tree.map(lambda x: x[None], sharding.gather_params(params, specs))

    copies = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=(specs,), out_specs=sharding.BATCH, check_vma=False))(
        sharding.put_params(params, mesh)
    )
    for name, value in params.items():
        np.testing.assert_array_equal(copies[name], np.broadcast_to(value, (8, *value.shape)))


def test_gradients_are_summed_over_all_devices_and_each_keeps_its_slice(mesh):
    shapes = {"big": BIG, "small": (5,)}
    rng = np.random.default_rng(0)
    parts = {name: rng.standard_normal((8, *shape)).astype(np.float32) for name, shape in shapes.items()}
    specs = {name: sharding.param_spec(name, shape, 4) for name, shape in shapes.items()}

    def summed(parts):
        return sharding.scatter_grads(jax.tree.map(lambda x: x[0], parts), specs)

    total = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(sharding.BATCH,), out_specs=specs, check_vma=False))(
        sharding.put_batch(parts, mesh)
    )
    for name, value in parts.items():
        np.testing.assert_allclose(total[name], value.sum(0), rtol=1e-5, atol=1e-5)
    assert {shard.data.shape for shard in total["big"].addressable_shards} == {(128, 64)}
