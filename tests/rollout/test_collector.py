"""Rollouts with a toy policy: who gets which prompt, noise, reward, weight and mask; on one device and on eight."""

import dataclasses
import functools
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from ddpo_jax import sharding
from ddpo_jax.rollout import collector as rollout
from ddpo_jax.rollout.sampler import ImageSampler
from ddpo_jax.rollout.scoring import RewardError, RewardRunner

T, K = 4, 2
WORDS = ["o" * length for length in range(1, 13)]


def embed(prompts):
    """The number of letters in every entry."""
    lengths = np.array([len(prompt) for prompt in prompts], np.float32)
    return np.broadcast_to(lengths[:, None, None] / 10, (len(prompts), toy.LENGTH, toy.FEATURES)).copy()


@jax.jit
def decode(latents):
    """Images [N, 4, 4, 3] of the first three channels."""
    return jnp.clip(127 + 40 * latents[..., :3], 0, 255).astype(jnp.uint8)


def prompts(rng, n):
    chosen = rng.permutation(len(WORDS))[:n]
    return [WORDS[i] for i in chosen], [{"word": int(i)} for i in chosen]


class Reward:
    """Mean of the image plus the prompt's length; remembers what it was called with. ``fault`` makes it fail once."""

    def __init__(self):
        self.calls, self.threads, self.fault = [], set(), False

    def __call__(self, images, names, metadata):
        self.calls.append((names, metadata))
        self.threads.add(threading.current_thread())
        if self.fault:
            self.fault = False
            raise OSError("no")
        assert [WORDS[entry["word"]] for entry in metadata] == names
        parts = {"length": np.array([len(name) for name in names], "f4")} if len(self.calls) % 2 else {}
        return images.mean((1, 2, 3)) + np.array([len(name) for name in names]), parts


def squares(latents, transition):
    """Un-normalised weights that differ between samples and steps."""
    return (latents[:, 1:] - latents[:, :-1]).mean((2, 3, 4)) ** 2 + 0.1


PARAMS = jax.tree.map(jnp.asarray, toy.parameters())
CODEC = types.SimpleNamespace(latent_shape=toy.SHAPE, embed=embed, decode=decode)


def collector(mesh=(1, 1), reward=None, *, batch_size=8, num_batches=2, policy=None, **options):
    devices = sharding.make_mesh(*mesh)
    frozen, uncond = sharding.put_params(toy.FROZEN, devices), sharding.replicate(toy.contexts(1)[1], devices)
    sampler = ImageSampler(policy or toy.policy(T), frozen, uncond, CODEC, devices, squares)
    plan = rollout.Plan(seed=3, batch_size=batch_size, num_batches=num_batches, samples_per_prompt=K, **options)
    return rollout.Collector(sampler, prompts, RewardRunner(reward or Reward()), plan)


def collect(made, epoch=0, branch_step=0):
    return made.collect(epoch, PARAMS, branch_step)


def counting(policy):
    """The policy, and a list that grows whenever its network is traced."""
    traced = []

    def network(*inputs):
        traced.append(None)
        return policy.network(*inputs)

    return dataclasses.replace(policy, network=network), traced


@pytest.fixture(scope="module")
def made():
    return collector()


@pytest.fixture(scope="module")
def drawn(made):
    return collect(made)


def test_everything_belongs_to_the_same_sample(drawn):
    latents, names = drawn.latents, drawn.prompts
    assert len(latents) == len(names) == len(drawn.images) == 16
    assert names[::2] == names[1::2] and len(set(names)) == 8  # K samples in a row share a prompt
    np.testing.assert_array_equal(drawn.context, embed(names))
    np.testing.assert_array_equal(drawn.images, decode(latents[:, -1]))
    expected = drawn.images.mean((1, 2, 3)) + np.array([len(name) for name in names])
    np.testing.assert_allclose(drawn.rewards, expected, rtol=1e-6)
    assert latents.shape == (16, T + 1, *toy.SHAPE) and drawn.log_prob.shape == (16, T)
    for field in (latents, drawn.log_prob, drawn.weights, drawn.rewards):
        assert isinstance(field, np.ndarray) and field.dtype == np.float32
    same = np.array(names)[:, None] == np.array(names)
    np.testing.assert_array_equal(drawn.prompt_ids[:, None] == drawn.prompt_ids, same)


def test_groups_are_draws_of_a_prompt_and_differ_between_epochs(made, drawn):
    np.testing.assert_array_equal(np.unique(drawn.group_ids, return_inverse=True)[1], np.arange(16) // K)
    later = collect(made, epoch=1)
    assert not set(later.group_ids) & set(drawn.group_ids)
    np.testing.assert_array_equal(drawn.group_ids, collect(made).group_ids)


def test_an_epoch_follows_from_its_number(made, drawn):
    again, later = collect(made), collect(made, epoch=1)
    assert again.prompts == drawn.prompts and later.prompts != drawn.prompts
    np.testing.assert_array_equal(again.latents, drawn.latents)
    np.testing.assert_array_equal(again.rewards, drawn.rewards)
    assert np.abs(later.latents[:, 0] - drawn.latents[:, 0]).mean() > 0.5
    noise = drawn.latents[:, 0].reshape(16, -1)
    assert len(np.unique(noise[:, 0])) == 16  # no two samples start alike, of the same prompt or batch


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_eight_devices_draw_what_one_draws(drawn, mesh):
    other = collect(collector(mesh))
    assert other.prompts == drawn.prompts
    np.testing.assert_array_equal(other.latents[:, 0], drawn.latents[:, 0])
    for name in ("latents", "log_prob", "weights"):
        np.testing.assert_allclose(getattr(other, name), getattr(drawn, name), atol=2e-5, rtol=1e-4)
    assert np.abs(other.images.astype(int) - drawn.images).max() <= 1  # rounding


def test_the_size_of_a_sampling_batch_does_not_matter(drawn):
    whole = collect(collector(batch_size=16, num_batches=1))
    assert whole.prompts == drawn.prompts
    np.testing.assert_array_equal(whole.latents[:, 0], drawn.latents[:, 0])
    np.testing.assert_allclose(whole.latents, drawn.latents, atol=2e-5)
    np.testing.assert_allclose(whole.rewards, drawn.rewards, atol=0.5)  # of pixels that round


def test_weights_are_those_of_each_trajectory(drawn):
    np.testing.assert_allclose(drawn.weights, squares(drawn.latents, None), rtol=1e-5)
    assert drawn.branch_step == 0


def test_a_step_without_density_is_sampled():
    found = collect(collector(num_batches=1, policy=toy.policy(T, set_alpha_to_one=True)))
    assert np.isfinite(found.log_prob).all() and np.isfinite(found.latents).all()


def test_branches_share_the_first_steps(made):
    found = collect(made, branch_step=2)
    pairs = found.latents.reshape(8, K, T + 1, -1)
    np.testing.assert_array_equal(pairs[:, 0, :3], pairs[:, 1, :3])
    assert (np.abs(pairs[:, 0, 3:] - pairs[:, 1, 3:]).mean(2) > 0.01).all()
    assert len(np.unique(pairs[:, 0, 0, 0])) == 8
    assert found.branch_step == 2


def test_shared_noise_is_the_initial_noise_alone():
    pairs = collect(collector(shared_noise=True)).latents.reshape(8, K, T + 1, -1)
    np.testing.assert_array_equal(pairs[:, 0, 0], pairs[:, 1, 0])
    assert (np.abs(pairs[:, 0, 1:] - pairs[:, 1, 1:]).mean(2) > 0.01).all()


def test_rewards_run_on_a_host_thread_once_per_batch_in_order():
    reward = Reward()
    found = collect(collector(reward=reward))
    assert [names for names, _ in reward.calls] == [found.prompts[:8], found.prompts[8:]]
    assert threading.main_thread() not in reward.threads
    # the part that the second batch did not report is not known there
    lengths = [len(name) for name in found.prompts[:8]]
    np.testing.assert_array_equal(found.parts["length"], [*lengths, *[np.nan] * 8])
    assert found.rollout_s > 0 and found.reward_s >= 0


def test_no_more_than_two_batches_are_on_the_device(monkeypatch):
    """Of images and of trajectories, while the reward of every batch is still waited for."""
    images, counts, drawn = [], [], threading.Event()

    def watched(latents):
        whole = [x for x in jax.live_arrays() if x.shape == (4, T + 1, *toy.SHAPE)]
        trajectories = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in whole}  # an array and its shard
        images.append(weakref.ref(made := decode(latents)))
        counts.append((sum(image() is not None for image in images), len(trajectories)))
        if len(images) == 6:
            drawn.set()
        return made

    def slow(shown, names, metadata):
        assert drawn.wait(30)
        return shown.mean((1, 2, 3))

    monkeypatch.setattr(CODEC, "decode", watched)
    found = collect(collector(reward=slow, batch_size=4, num_batches=6))
    assert counts == [(1, 1), *[(2, 2)] * 5]
    assert not any(image() is not None for image in images)
    np.testing.assert_array_equal(found.images, decode(found.latents[:, -1]))


def test_a_batch_is_waited_for_when_the_next_one_has_been_started():
    log = []

    class Batch:
        def __init__(self, number):
            self.number = number
            log.append(f"start {number}")

        def copy_to_host_async(self):
            log.append(f"copy {self.number}")

        def __array__(self, *args, **kwargs):
            log.append(f"wait {self.number}")
            return np.asarray(self.number)

    assert [int(batch) for batch in rollout.landed(map(Batch, range(3)))] == [0, 1, 2]
    order = [entry for entry in dict.fromkeys(log)]
    starts = ["start 0", "copy 0", "start 1", "copy 1", "wait 0", "start 2", "copy 2", "wait 1", "wait 2"]
    assert order == starts
    assert list(rollout.landed(iter([]))) == []


def test_a_failed_reward_leaves_nothing_behind(drawn):
    reward = Reward()
    made = collector(reward=reward)
    reward.fault = True
    with pytest.raises(RewardError, match="OSError: no"):
        collect(made)
    np.testing.assert_array_equal(collect(made).latents, drawn.latents)


def test_one_program_for_all_epochs_and_branch_steps_and_the_fixed_images():
    policy, traced = counting(toy.policy(T))
    made = collector(policy=policy)
    collect(made)
    once = len(traced)
    collect(made, epoch=5, branch_step=1)
    made.fixed(PARAMS, 3)
    assert once > 0 and len(traced) == once


def test_fixed_images_change_with_the_policy_alone():
    """The same prompts and noise whatever was collected, no reward, one image a prompt."""
    reward = Reward()
    made = collector(reward=reward, shared_noise=True)
    images, names = made.fixed(PARAMS, 6)
    before = collect(made, epoch=1)
    again, same_names = made.fixed(PARAMS, 6)
    np.testing.assert_array_equal(images, again)
    assert names == same_names and len(set(names)) == len(images) == 6
    assert names != before.prompts[:12:2] and not (images[:, None] == before.images).all((2, 3, 4)).any()
    other, _ = made.fixed(jax.tree.map(lambda x: 2 * x, PARAMS), 6)
    assert np.abs(other.astype(int) - images).mean() > 0.1
    assert len(made.fixed(PARAMS, 99)[0]) == 8  # at most a batch
    assert len(reward.calls) == 2
    alone = collect(collector(shared_noise=True), epoch=1)
    np.testing.assert_array_equal(before.latents, alone.latents)


def test_prompt_ids_are_63_bit_names():
    ids = [rollout.prompt_id(f"prompt {i}") for i in range(2000)]
    assert len(set(ids)) == 2000 and min(ids) >= 0 and max(ids) < 2**63 and max(ids) > 2**60
    assert rollout.prompt_id("prompt 7") == ids[7]


def test_network_options_reach_the_sampler():
    """The guidance scale is the policy's: another one, another trajectory from the same noise."""
    policy = functools.partial(toy.policy, T)
    few, many = (collect(collector(num_batches=1, policy=policy(guidance_scale=scale))).latents for scale in (1.0, 8.0))
    np.testing.assert_array_equal(few[:, 0], many[:, 0])
    assert np.abs(few[:, -1] - many[:, -1]).mean() > 0.01
