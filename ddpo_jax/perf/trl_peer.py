"""The peer of ``ddpo_jax benchmark --against=trl``: epochs of TRL's DDPOTrainer, in a process of its own.

It is the only file of the package that imports torch, and is run, never imported: ``python -m ddpo_jax.perf.trl_peer
SETTINGS`` with the JSON of ``against.Settings``. It writes a line when it is ready, and after every line that it reads
the seconds that one more epoch took.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from typing import Any

from PIL import Image


def _jpeg(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
    """Minus the JPEG size in kB (quality 95), which ``jpeg_compressibility`` measures as well."""
    import torch

    sizes = []
    for image in (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return -torch.tensor(sizes), {}


def main(settings: dict[str, Any]) -> None:
    """Trains an epoch for every line on standard input."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # without it TRL's logger raises
    torch.set_num_threads(settings["threads"])
    prompts = settings["prompts"]
    drawn = iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            seed=0,
            log_with=None,
            logdir=folder,
            project_kwargs={"project_dir": folder},
            save_freq=10**9,
            mixed_precision="no",
            sample_num_steps=settings["steps"],
            sample_guidance_scale=settings["guidance"],
            sample_batch_size=settings["sample_batch"],
            sample_num_batches_per_epoch=settings["batches"],
            train_batch_size=settings["train_batch"],
            train_cfg=settings["guidance"] > 1,
            train_learning_rate=settings["learning_rate"],
            train_timestep_fraction=1.0,
            per_prompt_stat_tracking=True,
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(settings["model"], use_lora=False)
        reward: Any = _jpeg
        trainer = DDPOTrainer(config, reward, lambda: (prompts[next(drawn) % len(prompts)], {}), pipeline)
        print("ready", flush=True)
        step = 0
        for epoch, _ in enumerate(sys.stdin):
            start = time.perf_counter()
            step = trainer.step(epoch, step)
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
