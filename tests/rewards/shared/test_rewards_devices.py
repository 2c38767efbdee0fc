"""Where the networks of rewards compute: on the policy's devices, which share a batch, or on the host."""

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from ddpo_jax import find, sharding
from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import batches
from ddpo_jax.rollout.scoring import make_reward

PROMPTS = ["a red circle", "two green stars", "a dog", "a red circle", "the blue square"]


@pytest.fixture
def mesh():
    """Devices 4 to 7, none of which is the first."""
    return jax.sharding.Mesh(np.asarray(jax.devices()[4:]).reshape(2, 2), sharding.BATCH_AXES)


class Scale(nnx.Module):
    def __init__(self):
        self.by = nnx.Param(np.float32(3))


@pytest.mark.parametrize(
    ("device", "batch_size", "size", "numbers"), [("mesh", 6, 8, {4, 5, 6, 7}), ("host", 6, 6, {0})]
)
def test_a_batch_is_shared_by_the_devices_of_the_policy_or_stays_on_the_host(mesh, device, batch_size, size, numbers):
    rows_of_a_device = set()

    def fn(model, rows):
        rows_of_a_device.add(len(rows))
        return rows.sum(1) * model.by[...]

    model, config = Scale(), ConfigDict({"batch_size": batch_size, "device": device})
    with batches.on_mesh(mesh):
        run = batches.in_batches(model, fn, config)
        placed = model.by[...]
        batches.in_batches(model, fn, config)
    assert {each.id for each in placed.devices()} == numbers  # nothing stays on the first device
    first, second = (x.addressable_shards[-1].data.unsafe_buffer_pointer() for x in (placed, model.by[...]))
    assert first == second  # two programs of a model share its parameters
    rows = np.arange(46, dtype=np.uint8).reshape(23, 2)
    np.testing.assert_array_equal(run(rows), 3 * rows.astype(int).sum(1))  # made there, called anywhere
    assert rows_of_a_device == {size // len(numbers)}


@pytest.mark.parametrize("device", ["mesh", "host"])
def test_scores_do_not_depend_on_the_device(device, mesh, clip_folder, images):
    member = find.find("rewards", "clip_score")
    config = member.default_config()
    config.update({"name": "clip_score", "weights": "B/32", "clip": str(clip_folder), "batch_size": 2})
    alone = make_reward(config, member)(images, PROMPTS, [{}] * 5)[0]
    config.device = device
    np.testing.assert_allclose(make_reward(config, member, mesh)(images, PROMPTS, [{}] * 5)[0], alone, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in find.available("rewards") if name != "vlm"])
def test_every_reward_with_networks_has_the_choice(name, request, clip_folder):
    member = find.find("rewards", name)
    config = member.default_config()
    if "batch_size" not in config or "dtype" not in config:
        assert "device" not in config
        return
    options = {"weights": "mini"} if "weights" in config else request.getfixturevalue(f"{name}_options")
    config.update(options | {"device": "elsewhere"})
    with pytest.raises(InputError, match=r"^reward.device='elsewhere': must be mesh or host$"):
        member.make(config)


def test_without_the_hosts_processors_the_line_says_how_to_have_them(monkeypatch):
    def missing(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(InputError, match=r"reward.device='host': .*Unknown backend cpu.*add ,cpu to it, or") as caught:
        batches.places("host")
    assert "\n" not in str(caught.value)
