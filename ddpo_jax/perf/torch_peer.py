"""The peer of ``ddpo_jax benchmark --against=torch``: rollout and update as a loop in PyTorch, in a process of its own.

The network is diffusers' UNet2DConditionModel of the same size with random weights, on a GPU compiled by
``torch.compile``; what is trained is what is trained here: adapters (peft) or everything, in float32 beside a network
that computes in ``dtype``. Run, never imported: ``python -m ddpo_jax.perf.torch_peer SETTINGS`` with the JSON of
``against.Loop``. It writes a line when it is ready, and after every line that it reads, "rollout" or "update", the
seconds that this took.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch


class Loop:
    """What a DDPO script does with its network, on one device."""

    def __init__(self, settings: dict[str, Any]):
        from diffusers import UNet2DConditionModel

        self.s = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, settings["dtype"])
        torch.manual_seed(0)
        torch.set_num_threads(settings["threads"])
        torch.backends.cuda.matmul.allow_tf32 = True
        with self.device:
            unet: Any = UNet2DConditionModel(**settings["unet"])
        if settings["rank"]:
            from peft import LoraConfig

            rank = settings["rank"]
            unet.requires_grad_(False).to(self.dtype)
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=settings["targets"]))
        if settings["remat"]:
            unet.enable_gradient_checkpointing()
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings["learning_rate"])
        self.network = torch.compile(unet) if self.device.type == "cuda" else unet
        n, (height, width, channels) = settings["batch"], settings["latent"]
        self.shape = (n, channels, height, width)
        self.context = torch.randn(n, *settings["context"], device=self.device)
        self.uncond = torch.randn(1, *settings["context"], device=self.device)
        self.advantages = torch.randn(n, device=self.device)
        self.latents: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def run(self, work: str) -> float:
        """Seconds of a "rollout" of the batch, or of an "update" on it at every step."""
        self._wait()
        start = time.perf_counter()
        getattr(self, work)()
        self._wait()
        return time.perf_counter() - start

    @torch.no_grad()
    def rollout(self) -> None:
        """Draws the batch: latents and log-probs of every step, kept for the updates."""
        latents = torch.randn(self.shape, device=self.device)
        self.latents, self.log_probs = [latents], []
        for step, std in enumerate(self.s["std"]):
            mean = self._mean(step, latents, self.context)
            latents = mean + std * torch.randn_like(mean)
            self.log_probs.append(self._log_prob(mean, std, latents))
            self.latents.append(latents)

    def update(self) -> None:
        """One optimizer step of the clipped objective on the batch, microbatch by microbatch and step by step."""
        if not self.latents:
            self.rollout()
        steps = [step for step, std in enumerate(self.s["std"]) if std > 0]
        n, size = self.shape[0], self.s["microbatch"]
        for rows in torch.arange(n, device=self.device).split(size):
            advantages = self.advantages[rows]
            for step in steps:
                mean = self._mean(step, self.latents[step][rows], self.context[rows])
                new = self._log_prob(mean, self.s["std"][step], self.latents[step + 1][rows])
                ratio = torch.exp(new - self.log_probs[step][rows])
                clipped = ratio.clamp(1 - self.s["clip_range"], 1 + self.s["clip_range"])
                loss = torch.maximum(-advantages * ratio, -advantages * clipped).sum() / (n * len(steps))
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.s["max_grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _mean(self, step: int, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        guidance, time_input = self.s["guidance"], self.s["timesteps"][step]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if guidance == 1:
                output = self.network(latents, time_input, context).sample.float()
            else:
                both = torch.cat([self.uncond.expand_as(context), context])
                uncond, cond = self.network(torch.cat([latents] * 2), time_input, both).sample.float().chunk(2)
                output = uncond + guidance * (cond - uncond)
        return self.s["from_latents"][step] * latents + self.s["from_output"][step] * output

    def _log_prob(self, mean: torch.Tensor, std: float, latents: torch.Tensor) -> torch.Tensor:
        if not std:
            return torch.zeros(len(mean), device=self.device)
        return -(((latents - mean) / std) ** 2).flatten(1).mean(1) / 2  # up to a constant, which no ratio has

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(settings: dict[str, Any]) -> None:
    """Answers every line on standard input."""
    loop = Loop(settings)
    print("ready", flush=True)
    for line in sys.stdin:
        print(loop.run(line.strip()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
