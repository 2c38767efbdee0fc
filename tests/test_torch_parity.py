"""``ddpo``'s whole update against an independent one in PyTorch: diffusers' UNet and scheduler, autograd, torch AdamW.

Both start from one diffusers folder whose UNet PyTorch made, and get the same trajectories (sampled by PyTorch), prompt
embeddings and rewards. PyTorch computes in float64, so that what differs is our rounding.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import PROMPTS, SMALLEST_UNET, quick_compilation, tiny_config, tiny_pipeline_folder

from ddpo_jax import batching, sharding
from ddpo_jax.build import build
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Samples

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
    """DDPO with importance sampling as 001 describes it, one sample and one step after the other."""

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
        """Trajectories [N, T + 1, c, h, w] and their log-probabilities [N, T], from noise of the trajectories' shape."""
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


def worst(got, want, scale):
    """The largest difference over all arrays, in units of ``scale(wanted array)``."""
    assert got.keys() == want.keys()
    return max(np.abs(got[name] - want[name]).max() / scale(want[name]) for name in want)


@quick_compilation()
def test_two_updates_equal_pytorch(folder):
    config = tiny_config(
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
    parts, theirs = build(config), Theirs(folder)
    parts.learner._tx = optax.chain(record(), parts.learner._tx)
    state = parts.init()

    rng = np.random.default_rng(0)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(N)]
    context, null = parts.model.pipeline.embed(prompts), np.asarray(parts.uncond)
    rewards = rng.normal(size=N) * 3 - 20
    noise = torch.from_numpy(rng.normal(size=(N, T + 1, 4, 8, 8)).astype(np.float32)).double()
    their_context, their_null = torch.from_numpy(context).double(), torch.from_numpy(null).double()
    latents, log_prob = theirs.sample(their_context, their_null, noise)
    their_advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # too few per prompt: of the whole batch

    prompt_ids = np.arange(N) % len(PROMPTS)
    samples = Samples(
        latents=latents.permute(0, 1, 3, 4, 2).float().numpy(),
        log_prob=log_prob.float().numpy(),
        weights=np.ones((N, T), np.float32),
        mask=np.ones((N, T), np.float32),
        context=context,
        prompt_ids=prompt_ids,
        group_ids=prompt_ids,
        rewards=rewards.astype(np.float32),
        advantages=parts.algorithm.advantages(rewards, prompt_ids, PromptStats(), config.algorithm).astype(np.float32),
    )
    for update in range(2):
        rows = slice(update * BATCH, (update + 1) * BATCH)
        columns = rng.permuted(np.tile(np.arange(T, dtype=np.int32), (BATCH, 1)), axis=1)
        batch = sharding.put_batch(batching.minibatch(rng, samples[rows], columns), parts.mesh)
        state, ours = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
        loss, gradients, norm, outside = theirs.update(
            latents[rows], log_prob[rows], their_context[rows], their_null, their_advantages[rows]
        )
        print(update, float(ours["loss"]), loss, float(ours["grad_norm"]), norm, outside, float(ours["ratio_deviation"]), float(ours["clip_fraction"]))
        got = under_their_names(state.opt_state[0])
        print(sorted([(float(np.linalg.norm(got[k]-gradients[k])/np.linalg.norm(gradients[k])), float(np.linalg.norm(gradients[k])), k) for k in got])[::-1][:6])
        print(worst(got, gradients, lambda x: norm))
        now = {k:v.detach().numpy() for k,v in theirs.unet.named_parameters()}
        ps=under_their_names(state.params)
        print(sorted([(float(np.abs(ps[k]-now[k]).max()/LEARNING_RATE), k) for k in got])[::-1][:4])
