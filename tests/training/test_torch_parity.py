"""``ddpo``'s whole update against an independent one in PyTorch: diffusers' UNet and scheduler, autograd, torch AdamW.

Both start from one diffusers folder whose UNet PyTorch made, and get the same trajectories (sampled by PyTorch), prompt
embeddings and rewards. PyTorch computes in float64, so that what differs is our rounding.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import PROMPTS, SMALLEST_UNET, quick_compilation, tiny_pipeline_folder, tiny_ready

from ddpo_jax import sharding
from ddpo_jax.algorithms import ddpo
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.training import batching
from ddpo_jax.training.build import build
from ddpo_jax.training.learner import Learner, Objective, make_optimizer
from ddpo_jax.types import Batch, ScoredSamples, StepTerms

torch = pytest.importorskip("torch", reason="the other implementation is in PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the other implementation is of diffusers' UNet")

N, BATCH, T, GUIDANCE = 8, 4, 3, 5.0
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, CLIP_RANGE = 3e-4, 1e-2, 1.0, 8e-4
# Where a gradient is no larger than rounding, Adam's quotient of moments is noise; this offset makes it small instead.
ADAM_EPS = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, its UNet with the random weights of PyTorch's own initialisers, saved by diffusers."""
    folder = tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=SMALLEST_UNET)
    config = json.loads((folder / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


class Theirs:
    """DDPO with importance sampling as Black et al. 2023 describe it, one sample and one step after the other."""

    def __init__(self, folder):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double()
        self.scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        exact = torch.from_numpy(np.cumprod(1 - betas))
        torch.testing.assert_close(self.scheduler.alphas_cumprod.double(), exact, rtol=1e-4, atol=0)
        self.scheduler.alphas_cumprod, self.scheduler.final_alpha_cumprod = exact, exact[0]
        self.scheduler.set_timesteps(T)
        decay = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "eps": ADAM_EPS, "betas": (0.9, 0.999)}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), **decay)

    def step(self, latents, t, context, null):
        """Mean and standard deviation of the next latents [c, h, w]."""
        both = torch.stack([null, context])
        null_noise, noise = self.unet(torch.stack([latents, latents]), t, both).sample
        guided = null_noise + GUIDANCE * (noise - null_noise)
        mean = self.scheduler.step(guided, t, latents, eta=1.0, variance_noise=torch.zeros_like(latents)).prev_sample
        return mean, self.scheduler._get_variance(t, t - 1000 // T) ** 0.5

    def log_prob(self, latents, t, context, null):
        """Of ``latents[1]`` given ``latents[0]``, averaged over dimensions."""
        mean, std = self.step(latents[0], t, context, null)
        return torch.distributions.Normal(mean, std).log_prob(latents[1]).mean()

    @torch.no_grad()
    def sample(self, context, null, noise):
        """Trajectories [N, T + 1, c, h, w] and their log-probabilities [N, T], from noise of their shape."""
        paths, log_probs = [], []
        for embedding, (latents, *steps) in zip(context, noise, strict=True):
            path, log_prob = [latents], []
            for t, z in zip(self.scheduler.timesteps, steps, strict=True):
                mean, std = self.step(path[-1], t, embedding, null)
                path.append((mean + std * z).float().double())  # ours are float32
                log_prob.append(self.log_prob(path[-2:], t, embedding, null))
            paths.append(torch.stack(path))
            log_probs.append(torch.stack(log_prob))
        return torch.stack(paths), torch.stack(log_probs)

    def update(self, latents, old_log_prob, context, null, advantages):
        """One optimizer step: ``(loss, gradients before the clip, norm, share of ratios outside the range)``."""
        self.optimizer.zero_grad()
        total, outside = 0.0, 0
        for n, advantage in enumerate(advantages):
            for step, t in enumerate(self.scheduler.timesteps):
                log_prob = self.log_prob(latents[n, step : step + 2], t, context[n], null)
                ratio = torch.exp(log_prob - old_log_prob[n, step])
                clipped = torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped) / (len(advantages) * T)
                loss.backward()
                total, outside = total + loss.item(), outside + (clipped != ratio).item()
        gradients = {name: parameter.grad.numpy().copy() for name, parameter in self.unet.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), MAX_GRAD_NORM).item()
        self.optimizer.step()
        return total, gradients, norm, outside / (len(advantages) * T)


def record():
    """An optimizer step that lets gradients through and remembers them."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p: (g, g))


def under_their_names(params):
    """Our flat parameters in PyTorch's names and layout."""
    out = {}
    for name, value in params.items():
        path, _, kind = name.rpartition(".")
        value = np.asarray(value, np.float64)
        if kind == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        out[f"{path}.{'bias' if kind == 'bias' else 'weight'}"] = value
    return out


def worst(got, want, unit):
    """The largest difference of a number over all arrays, in units of ``unit``."""
    assert got.keys() == want.keys()
    return max(np.abs(got[name] - want[name]).max() for name in want) / unit


@quick_compilation()
def test_two_updates_equal_pytorch(folder):
    ready = tiny_ready(
        folder,
        **{
            "mesh.data": 1,
            "sample.batch_size": N,
            "train.batch_size": BATCH,
            "train.learning_rate": LEARNING_RATE,
            "train.weight_decay": WEIGHT_DECAY,
            "train.adam_eps": ADAM_EPS,
            "train.max_grad_norm": MAX_GRAD_NORM,
            "train.clip_range": CLIP_RANGE,
            "train.lora_rank": 0,
            "sample.guidance_scale": GUIDANCE,
            "sample.num_steps": T,
            "train.microbatch_size": 2,
        },
    )
    parts, theirs, options = build(ready), Theirs(folder), ready.config.train
    loss = functools.partial(ddpo.loss, config=ready.config.algorithm)
    tx = optax.chain(record(), make_optimizer(options))
    objective = Objective(parts.traits, loss, options.clip_range)
    parts.learner = Learner(parts.sampler.policy, objective, tx, parts.mesh, options.microbatch_size)
    state = parts.init()

    rng = np.random.default_rng(0)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(N)]
    context, null = parts.model.pipeline.embed(prompts), np.asarray(parts.uncond)
    rewards = rng.normal(size=N) * 3 - 20
    noise = torch.from_numpy(rng.normal(size=(N, T + 1, 4, 8, 8)).astype(np.float32)).double()
    their_context, their_null = torch.tensor(context).double(), torch.tensor(null).double()
    latents, log_prob = theirs.sample(their_context, their_null, noise)
    their_advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # too few per prompt: of the whole batch

    prompt_ids = np.arange(N) % len(PROMPTS)
    samples = ScoredSamples(
        latents=latents.permute(0, 1, 3, 4, 2).float().numpy(),
        log_prob=log_prob.float().numpy(),
        weights=np.ones((N, T), np.float32),
        mask=np.ones((N, T), np.float32),
        context=context,
        prompt_ids=prompt_ids,
        group_ids=prompt_ids,
        rewards=rewards.astype(np.float32),
        advantages=parts.algorithm.advantages(rewards, prompt_ids, PromptStats(), ready.config.algorithm).astype(
            np.float32
        ),
    )
    for update in range(2):
        rows = slice(update * BATCH, (update + 1) * BATCH)
        columns = rng.permuted(np.tile(np.arange(T, dtype=np.int32), (BATCH, 1)), axis=1)
        batch = sharding.put_batch(batching.minibatch(rng, samples[rows], columns), parts.mesh)
        state, ours = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
        loss, gradients, norm, outside = theirs.update(
            latents[rows], log_prob[rows], their_context[rows], their_null, their_advantages[rows]
        )
        # The second update starts from parameters that differ by the rounding of the first.
        assert worst(under_their_names(state.opt_state[0]), gradients, norm) < (1e-5, 2e-5)[update]
        np.testing.assert_allclose([ours["loss"], ours["grad_norm"]], [loss, norm], rtol=1e-5)
        np.testing.assert_allclose(ours["clip_fraction"], outside, rtol=1e-6)
        if update == 0:
            assert norm > MAX_GRAD_NORM and ours["ratio_deviation"] < CLIP_RANGE / 10, "the clip of the norm matters"
    assert 0 < outside < 1, "the clip of the ratio matters"
    params = {name: parameter.detach().numpy() for name, parameter in theirs.unet.named_parameters()}
    assert worst(under_their_names(state.params), params, LEARNING_RATE) < 0.03  # of one step, after two


def test_trl_has_the_same_log_probability_and_loss(folder):
    """The last release with a DDPO trainer, on one step of every sample; then the chain above leads from it to ours."""
    trl = pytest.importorskip("trl", reason="trl==0.22.2, the last release with DDPOTrainer, is not installed")
    if not hasattr(trl, "DDPOTrainer"):
        pytest.skip("this trl has no DDPOTrainer; 0.22.2 is the last release that has")
    from trl.models.modeling_sd_base import scheduler_step

    theirs, rng = Theirs(folder), torch.Generator().manual_seed(0)
    for t in theirs.scheduler.timesteps:
        latents, output, z = torch.randn((3, N, 4, 8, 8), generator=rng, dtype=torch.float64)
        mean = theirs.scheduler.step(output, t, latents, eta=1.0, variance_noise=torch.zeros_like(z)).prev_sample
        std = theirs.scheduler._get_variance(t, t - 1000 // T) ** 0.5
        drawn = mean + std * z
        log_prob = torch.distributions.Normal(mean, std).log_prob(drawn).mean((1, 2, 3))
        found = scheduler_step(theirs.scheduler, output, t, latents, eta=1.0, prev_sample=drawn).log_probs
        torch.testing.assert_close(found, log_prob, rtol=1e-5, atol=1e-6)
    ratio, advantages = 1 + 2e-3 * torch.randn(N, generator=rng), torch.randn(N, generator=rng)
    terms = StepTerms(log_prob=jnp.log(ratio.numpy())[:, None])
    data = Batch(
        old_log_prob=jnp.zeros((N, 1)),
        advantages=jnp.asarray(advantages.numpy()),
        rewards=jnp.zeros(N),
        prompt_ids=jnp.zeros(N, jnp.int32),
        mask=jnp.ones((N, 1)),
        clip_range=CLIP_RANGE,
    )
    want = trl.DDPOTrainer.loss(None, advantages, CLIP_RANGE, ratio).item()  # which does not read self
    np.testing.assert_allclose(ddpo.loss(terms, data, ddpo.default_config()).mean(), want, rtol=1e-5)
