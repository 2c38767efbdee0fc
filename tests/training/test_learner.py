"""The learner against autograd of the whole loss: a float64 oracle in PyTorch that holds all steps at once."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from ddpo_jax import sharding
from ddpo_jax.diffusion import sampler
from ddpo_jax.ops import surrogate
from ddpo_jax.training import epoch
from ddpo_jax.training.learner import Learner, Minibatch, Objective, make_optimizer
from ddpo_jax.types import Traits

torch = pytest.importorskip("torch")

N, T, S, CLIP = 8, 4, 3, 0.02
MESHES = {"1": (1, 1), "8": (8, 1), "2x4": (2, 4)}
OLD, REFERENCE = toy.parameters(), toy.parameters(5)
PARAMS = {name: value + 0.05 * toy.parameters(9)[name] for name, value in OLD.items()}  # some updates after the rollout
UNCOND = toy.contexts(N)[1]
SEPARABLE = Traits(terms=frozenset({"log_prob"}))
COUPLED = Traits(terms=frozenset({"log_prob", "ref_log_prob", "kl", "noise_mse"}), separable=False)
# What is handed to the optimizer becomes its state: the gradient, not rounded by being added to parameters.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, params), grads),
)


@functools.cache
def minibatch(num_steps=T, trained=S):
    """A rollout of ``OLD``, random advantages, mask and weights; each sample trains its own steps in its own order."""
    rng = np.random.default_rng(3)
    context, uncond = toy.contexts(N)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(N))
    policy = toy.policy(num_steps)
    drawn = jax.jit(lambda *x: sampler.sample(policy, OLD, toy.FROZEN, *x, toy.SHAPE))(keys, context, uncond)
    steps = np.stack([rng.permutation(num_steps)[:trained] for _ in range(N)]).astype(np.int32)
    mask = (rng.random((N, trained)) < 0.8).astype(np.float32)
    return Minibatch(
        latents=np.asarray(drawn.latents),
        context=context,
        old_log_prob=np.asarray(drawn.log_prob),
        advantages=rng.standard_normal(N).astype(np.float32),
        rewards=rng.standard_normal(N).astype(np.float32),
        prompt_ids=np.repeat(np.arange(N // 2), 2).astype(np.int32),
        steps=steps,
        step_weight=rng.uniform(0.2, 2, (N, trained)).astype(np.float32),
        penalty_weight=np.ones((N, trained), np.float32),
        mask=mask,
        seeds=rng.integers(2**31, size=N).astype(np.int32),
    )


def ours_coupled(terms, batch, xp=jnp):
    """[N]: couples the steps of a trajectory, the trajectories with each other, and three terms."""
    total = (batch.mask * (terms.log_prob - terms.ref_log_prob)).sum(1)
    drift = (batch.mask * (terms.kl + 0.1 * terms.noise_mse)).sum(1)
    return (total - total.mean() - batch.advantages) ** 2 + 0.3 * total * drift


def objective(traits):
    def separable(terms, batch):
        return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], batch.clip_range)

    return Objective(traits, separable if traits.separable else ours_coupled, CLIP)


class Run:
    """A learner on a mesh, with everything it is called with."""

    def __init__(self, traits=SEPARABLE, mesh="1", microbatch=2, tx=RECORDER, num_steps=T, chosen=None, **options):
        self.mesh = sharding.make_mesh(*MESHES[mesh])
        policy, chosen = toy.policy(num_steps), chosen or objective(traits)
        self.learner = Learner(policy, chosen, tx, self.mesh, microbatch_size=microbatch, **options)
        self.state = self.learner.init({name: jnp.asarray(x) for name, x in PARAMS.items()})
        self.rest = [
            sharding.put_params(jax.tree.map(jnp.asarray, tree), self.mesh) for tree in (REFERENCE, toy.FROZEN)
        ]
        self.rest.append(sharding.replicate(jnp.asarray(UNCOND), self.mesh))

    def update(self, batch):
        self.state, metrics = self.learner.update(self.state, *self.rest, sharding.put_batch(batch, self.mesh))
        return jax.device_get(metrics)

    def gradient(self, batch):
        metrics = self.update(batch)
        return jax.device_get(self.state.opt_state), metrics

    def terms(self, batch):
        return jax.device_get(
            self.learner.log_prob(self.state.params, *self.rest, sharding.put_batch(batch, self.mesh))
        )


# ---- the oracle ----


def double(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def torch_network(params, latents, timesteps, context):
    h = torch.nn.functional.conv2d(latents.permute(0, 3, 1, 2), params["conv"].permute(3, 2, 0, 1), padding=1)
    h = (
        h.permute(0, 2, 3, 1)
        + (context.mean(1) @ params["prompt"])[:, None, None]
        + timesteps[:, None, None, None] / 1000
    )
    return torch.tanh(torch.tanh(h) @ params["mix"]) @ params["out"] + double(toy.FROZEN["bias"])


def torch_terms(params, batch):
    """log_prob, ref_log_prob, kl, noise_mse [N, S] by the formulas of Song et al. 2021, all pairs at once, float64."""
    schedule = toy.policy(T).transition
    count = batch.steps.shape[1]
    rows, steps = np.repeat(np.arange(N), count), batch.steps.reshape(-1)
    latents, after = double(batch.latents[rows, steps]), double(batch.latents[rows, steps + 1])
    context, null = double(batch.context[rows]), double(UNCOND).expand(N * count, -1, -1)
    timesteps = double(schedule.timesteps)[steps]
    alpha, previous, std = (
        double(x)[steps][:, None, None, None] for x in (schedule.alpha, schedule.alpha_prev, schedule.std)
    )

    def gaussian(params):
        uncond, cond = (
            torch_network(params, latents, timesteps, null),
            torch_network(params, latents, timesteps, context),
        )
        eps = uncond + 3.0 * (cond - uncond)
        x0 = (latents - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        return previous.sqrt() * x0 + (1 - previous - std**2).sqrt() * eps, eps

    mean, eps = gaussian(params)
    with torch.no_grad():
        ref_mean, ref_eps = gaussian({name: double(value) for name, value in REFERENCE.items()})

    def reduce(x):
        return x.mean((1, 2, 3)).reshape(N, count)

    normal = torch.distributions.Normal
    ours, theirs = (normal(x, std.expand_as(x)) for x in (mean, ref_mean))
    return types.SimpleNamespace(
        log_prob=reduce(ours.log_prob(after)),
        ref_log_prob=reduce(theirs.log_prob(after)),
        kl=reduce(torch.distributions.kl_divergence(ours, theirs)),
        noise_mse=reduce((eps - ref_eps) ** 2),
    )


@functools.cache
def oracle(separable=True, weighted=True):
    """``(loss, gradient by name, terms)`` of ``minibatch()``."""
    batch = minibatch()
    params = {name: double(value).requires_grad_() for name, value in PARAMS.items()}
    terms = torch_terms(params, batch)
    mask, weight, advantages = double(batch.mask), double(batch.step_weight), double(batch.advantages)
    if separable:
        ratio = (terms.log_prob - double(np.take_along_axis(batch.old_log_prob, batch.steps, 1))).exp()
        losses = torch.maximum(-advantages[:, None] * ratio, -advantages[:, None] * ratio.clamp(1 - CLIP, 1 + CLIP))
        loss = (losses * mask * weight).sum() / mask.sum()
        loss.backward()
    else:
        data = types.SimpleNamespace(mask=mask, advantages=advantages)
        loss = ours_coupled(terms, data).mean()
        if weighted:  # the weights multiply the coefficients dL/dterm, not the terms inside the loss
            names = ("log_prob", "kl", "noise_mse")
            coefficients = torch.autograd.grad(loss, [getattr(terms, name) for name in names], retain_graph=True)
            total = sum((c * weight * getattr(terms, name)).sum() for c, name in zip(coefficients, names, strict=True))
            total.backward()
        else:
            loss.backward()
    return (
        loss.item(),
        {name: x.grad.numpy() for name, x in params.items()},
        jax.tree.map(lambda x: x.detach(), vars(terms)),
    )


def assert_gradient(found, expected, tolerance=2e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert distance < tolerance, f"{name}: relative distance {distance:.2g}"


# ---- one gradient, however it is computed ----


@pytest.fixture(scope="module")
def one():
    """Gradient and metrics of the separable loss on one device, in microbatches of 2."""
    return Run().gradient(minibatch())


def test_separable_gradient_is_that_of_the_whole_loss(one):
    loss, expected, terms = oracle()
    gradient, metrics = one
    assert_gradient(gradient, expected)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    batch = minibatch()
    log_ratio = terms["log_prob"].numpy() - np.take_along_axis(batch.old_log_prob, batch.steps, 1)
    kept = log_ratio[batch.mask > 0]
    np.testing.assert_allclose(metrics["ratio_deviation"], np.abs(np.expm1(kept)).max(), rtol=1e-3)
    np.testing.assert_allclose(metrics["approx_kl"], (np.expm1(kept) - kept).mean(), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(metrics["clip_fraction"], (np.abs(np.expm1(kept)) > CLIP).mean(), rtol=1e-6)
    assert 0.1 < metrics["clip_fraction"] < 0.9  # so that both branches of the surrogate took part
    norm = np.sqrt(sum((x**2).sum() for x in expected.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


@pytest.mark.parametrize("microbatch", [1, 8])
def test_microbatch_size_does_not_matter(one, microbatch):
    gradient, metrics = Run(microbatch=microbatch).gradient(minibatch())
    assert_gradient(gradient, one[0], 1e-5)
    np.testing.assert_allclose(metrics["loss"], one[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("mesh", ["8", "2x4"])
def test_eight_devices_compute_the_gradient_of_one(one, mesh):
    run = Run(mesh=mesh, microbatch=1)
    if mesh == "2x4":  # or nothing would be gathered and scattered
        assert run.state.params["mix"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    gradient, metrics = run.gradient(minibatch())
    assert_gradient(gradient, one[0], 1e-5)
    for name, value in one[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", ["1", "2x4"])
def test_coupled_gradient_in_two_passes_is_that_of_the_whole_loss(mesh):
    run = Run(COUPLED, mesh)
    flat = dataclasses.replace(minibatch(), step_weight=np.ones((N, S), np.float32))
    for weighted, batch in ((True, minibatch()), (False, flat)):
        loss, expected, terms = oracle(separable=False, weighted=weighted)
        gradient, metrics = run.gradient(batch)
        assert_gradient(gradient, expected)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    mask = minibatch().mask
    for name in ("kl", "noise_mse"):
        np.testing.assert_allclose(metrics[name], (terms[name].numpy() * mask).sum() / mask.sum(), rtol=1e-4)


def test_terms_of_all_pairs():
    found, (_, _, expected) = Run(COUPLED).terms(minibatch()), oracle(separable=False)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert found.denoise_mse is None and found.value is None


def test_denoising_term_is_the_error_of_the_noise_prediction_at_random_timesteps():
    """The same draws for a seed and column whatever the microbatch and mesh; and for a network that says 0, the mean
    square of the noise, which is 1."""
    traits = Traits(terms=frozenset({"denoise_mse"}))
    batch = minibatch()
    runs = [Run(traits, mesh, size) for mesh, size in (("1", 2), ("8", 1))]
    values = [run.terms(batch).denoise_mse for run in runs]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    assert len(np.unique(values[0])) == values[0].size
    silent = {name: jnp.zeros_like(value) for name, value in runs[0].state.params.items()}
    runs[0].state = dataclasses.replace(runs[0].state, params=silent)
    runs[0].rest[1] = {"bias": jnp.zeros(4)}
    squares = runs[0].terms(batch).denoise_mse
    assert abs(squares.mean() - 1) < 4 * np.sqrt(2 / (N * S * 64)) and squares.std() < 0.5
    assert len(np.unique(squares)) == squares.size


# ---- what is not trained ----


def test_masked_pairs_do_not_count_whatever_they_hold(one):
    """Padding may repeat or poison samples: their terms reach neither the gradient nor a metric."""
    batch = minibatch()
    extra = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    mask = np.concatenate([batch.mask, np.zeros_like(batch.mask)])
    advantages = np.concatenate([batch.advantages, np.full(N, 1e30, np.float32)])
    rewards = np.concatenate([batch.rewards, np.full(N, np.nan, np.float32)])
    padded = dataclasses.replace(extra, mask=mask, advantages=advantages, rewards=rewards)
    gradient, metrics = Run().gradient(padded)
    assert_gradient(gradient, one[0], 1e-5)
    for name, value in one[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_an_empty_mask_leaves_the_parameters_to_weight_decay():
    options = types.SimpleNamespace(
        max_grad_norm=1.0, learning_rate=0.1, adam_b1=0.9, adam_b2=0.999, adam_eps=1e-8, weight_decay=0.5
    )
    run = Run(tx=make_optimizer(options))
    metrics = run.update(dataclasses.replace(minibatch(), mask=np.zeros((N, S), np.float32)))
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
    for name, value in PARAMS.items():
        np.testing.assert_allclose(run.state.params[name], value * (1 - 0.1 * 0.5), rtol=1e-6)


# ---- the state ----


def test_optimizer_clips_the_global_norm_and_then_is_adamw():
    """Against torch.optim.AdamW on clipped gradients, three updates."""
    options = types.SimpleNamespace(
        max_grad_norm=0.5, learning_rate=0.01, adam_b1=0.8, adam_b2=0.95, adam_eps=1e-6, weight_decay=0.1
    )
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((3, 2)).astype(np.float32) for name in "ab"}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    tx = make_optimizer(options)
    state = tx.init(params)
    for scale in (1.0, 0.01, 10.0):  # clipped, not clipped, clipped
        grads = {name: (scale * rng.standard_normal((3, 2))).astype(np.float32) for name in "ab"}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in theirs.items():
            value.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adamw.step()
        for name, value in theirs.items():
            np.testing.assert_allclose(params[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_updates_reuse_their_program_and_their_buffers():
    """Also with parameters split over fsdp, whose layout an update must hand back as it found it."""
    run = Run(mesh="2x4", tx=optax.adam(1e-3), ema_decay=0.9)
    batch = sharding.put_batch(minibatch(), run.mesh)
    for _ in range(3):
        before = run.state
        run.state, _ = run.learner.update(before, *run.rest, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state, before.ema)))
        assert not any(x.is_deleted() for x in jax.tree.leaves((run.rest, batch)))
    assert run.learner.update._cache_size() == 1
    assert int(run.state.step) == 3


def test_init_leaves_the_given_parameters_alone():
    given = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    run = Run(tx=optax.sgd(0.1))
    run.state = run.learner.init(given)
    run.update(minibatch())
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(given[name], value)
        assert np.abs(np.asarray(run.state.params[name]) - value).max() > 0


def test_ema_averages_the_parameters_after_each_update():
    run = Run(tx=optax.sgd(0.1), ema_decay=0.75)
    expected = PARAMS
    for _ in range(2):
        run.update(minibatch())
        now = jax.device_get(run.state.params)
        expected = {name: 0.75 * value + 0.25 * now[name] for name, value in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(run.state.ema[name], value, rtol=1e-5, atol=1e-7)
    assert Run().state.ema == {}


@pytest.mark.parametrize("every, sources", [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (0, [0, 0, 0, 0])])
def test_the_policy_that_samples_is_the_trained_one_of_some_epochs_ago(every, sources):
    traits = dataclasses.replace(SEPARABLE, refresh_every=every)
    run = Run(tx=optax.sgd(0.1), chosen=objective(traits))
    history = []
    for number, source in enumerate(sources):
        history.append(jax.device_get(run.state.params["out"]))
        run.state, behaviour = epoch.refresh(run.state, traits, number)
        np.testing.assert_array_equal(behaviour["out"], history[source])
        run.update(minibatch())  # donates what it trains, not what samples
    assert np.abs(history[3] - history[0]).max() > 0


def test_memory_does_not_grow_with_the_number_of_steps():
    """Temporary memory of the compiled update; holding the activations of all steps would multiply it by 4."""

    def temporary(num_steps, traits):
        run = Run(traits, num_steps=num_steps, microbatch=N)
        batch = sharding.put_batch(minibatch(num_steps, num_steps), run.mesh)
        compiled = run.learner.update.lower(run.state, *run.rest, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for traits in (SEPARABLE, COUPLED):
        few, many = temporary(4, traits), temporary(16, traits)
        assert few > 1e5 and many < 1.1 * few, (few, many)
