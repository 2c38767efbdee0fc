"""Measures rollout and update on the devices at hand: a table, or JSON with --json.

Every time is the median of --repeats runs after a first one, which compiles; no compilation cache is used, so the
first run is a cold one. A sample-step is one denoising step of one image: in the rollout one guided network call, in
the update the gradient of its log-probability.

examples:
  ddpo_jax benchmark                                  the miniature: rollout, update, rewards per second
  ddpo_jax benchmark --against=trl                    an epoch of the miniature, in turns with TRL's DDPOTrainer
  ddpo_jax benchmark --model=sd15 --random-weights --against=torch    rollout and update, in turns with a PyTorch loop
  ddpo_jax benchmark --rewards                        rewards at full size on random weights, and the wait for one
  ddpo_jax benchmark --loop                           the convolution gradient inside a loop, by two rules
  ddpo_jax benchmark --model=sd15 --random-weights    Stable Diffusion 1.5 (sd21: 2.1) at 512 x 512, bfloat16
  ddpo_jax benchmark --model=sd15 --memory-only       what fits where: runs and allocates nothing
  ddpo_jax benchmark --model=sd15 --memory-only --compile-for=v5e-8 --batch=16 --set=train.lora_rank=0 \
      --set=mesh.fsdp=8                               what each of 8 chips holds, and what they tell each other
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import jax

from ddpo_jax.commands import _cli as cli
from ddpo_jax.config import default_config
from ddpo_jax.config.defaults import STABLE_DIFFUSION
from ddpo_jax.config.model import default_clip_range
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import Ready, make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.perf import against, benchmark, capacity, random_rewards, topology
from ddpo_jax.perf.random_model import SIZES, random_model
from ddpo_jax.training.build import build

SLOW_STEPS = 2  # more steps of a full-size model take a CPU too long


def make_config(args: Namespace, backend: str, devices: int) -> Ready:
    """The run to measure.

    Raises:
      InputError: one line for each fault.
    """
    config = default_config()
    config.model = args.model
    known = args.model in SIZES
    if known and not (args.random_weights or args.memory_only):
        raise InputError(f"--model: received {args.model!r}, which has no weights of its own; add --random-weights")
    if not known and (args.random_weights or args.memory_only):
        raise InputError(
            f"--model: received {args.model!r} to be without weights; it must be one of {', '.join(SIZES)}"
        )
    if known:
        config.model = STABLE_DIFFUSION  # never read: the networks are of ``SIZES``
        config.train.clip_range = default_clip_range(SIZES[args.model].latent_dims)
        config.dtype = "bfloat16"
        config.sample.num_batches_per_epoch = 1
    pairs = [("sample.num_steps", args.steps), ("sample.batch_size", args.batch), ("train.batch_size", args.batch)]
    given = [(key, str(value)) for key, value in pairs if value is not None]
    if args.batch is not None:
        given.append(("sample.num_batches_per_epoch", "1"))
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set: received {text!r}; it must be KEY=VALUE, such as train.lora_rank=0; add a value")
        given.append((key, value))
    override(config, given)
    ready = make_ready(config, backend, devices)
    slow = backend == "cpu" and ready.config.sample.num_steps > SLOW_STEPS
    if known and slow and not args.memory_only and SIZES[args.model].unet.block_out_channels[0] >= 320:
        raise InputError(
            f"--model: received {args.model!r} on a CPU, where a step of an image takes minutes; --steps must be at "
            f"most {SLOW_STEPS} there; use --steps=1 --batch=4, --memory-only, or an accelerator"
        )
    return ready


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("benchmark", __doc__)
    parser.add_argument("--model", default="mini", help=f"mini, a folder, a hub id, or {', '.join(SIZES)}; mini")
    parser.add_argument("--random-weights", action="store_true", help="for the models that have no weights here")
    parser.add_argument("--memory-only", action="store_true", help="print what memory it would take; runs nothing")
    parser.add_argument(
        "--compile-for",
        default="none",
        choices=("none", "here", *capacity.TOPOLOGIES, *capacity.SLICES),
        help="with --memory-only: ask a compiler too, of the device here, of a TPU by libtpu (an hour for SD), or of a "
        "slice of so many chips, for the config as it is (--set=mesh.fsdp=8): bytes on a chip and between chips; none",
    )
    parser.add_argument("--loop", action="store_true", help="compare convolution gradients inside a loop")
    parser.add_argument(
        "--against",
        choices=tuple(against.INSTALL),
        help="trl: epochs of the miniature in turns with its DDPOTrainer; torch: rollout and update in turns with a "
        "loop over diffusers' network (--set=train.lora_rank=0 trains all of it); where they are installed",
    )
    parser.add_argument(
        "--rewards",
        nargs="?",
        const="all",
        help=f"time rewards of full size on random weights: with commas, of {', '.join(random_rewards.FILES)}; all",
    )
    parser.add_argument("--repeats", type=cli.positive, default=5, help="timed runs, of which the median; 5")
    parser.add_argument("--steps", type=cli.positive, default=None, help="denoising steps; the model's default")
    parser.add_argument("--batch", type=cli.positive, default=None, help="images of a rollout and an update")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the config")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args(argv)
    rewards = random_rewards.check_names(args.rewards) if args.rewards else []
    if args.against == "torch":  # both processes are on the accelerator
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    backend, devices = cli.start_jax(cache=False)  # compile times are those of a first start
    header: dict[str, Any] = {"devices": f"{devices} x {jax.devices()[0].device_kind}"}
    if args.loop:
        print(benchmark.report(header, benchmark.loop_rows(args.repeats), args.json))
        return
    if args.against == "trl":
        print(benchmark.report(header, against.compare(args.repeats, backend, devices), args.json))
        return
    many = args.memory_only and args.compile_for in capacity.SLICES
    chips = capacity.devices_of(args.compile_for) if many else []
    ready = make_config(args, "tpu", len(chips)) if chips else make_config(args, backend, devices)
    config = ready.config
    train, size = config.train, SIZES[args.model] if args.model in SIZES else None
    header |= {"model": args.model, "dtype": config.dtype, "steps": config.sample.num_steps}
    header |= {"rollout batch": config.sample.batch_size, "update batch": train.batch_size}
    header |= {"microbatch": train.microbatch_size, "guidance": config.sample.guidance_scale}

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    if size and args.memory_only and chips:
        found = list(topology.compile_programs(ready, size, chips, progress))
        table = "" if args.json else f"\n\n{topology.table(found, len(chips), config.mesh.fsdp)}"
        print(benchmark.report(header, topology.rows(found) if args.json else [], args.json) + table)
        return
    if size and args.memory_only:
        start = time.perf_counter()
        entries = list(capacity.memory(ready, size, args.compile_for, progress))
        header |= {"seconds": round(time.perf_counter() - start)}
        table = "" if args.json else f"\n\n{benchmark.memory_table(entries, args.compile_for)}"
        print(benchmark.report(header, benchmark.memory_rows(entries) if args.json else [], args.json) + table)
        return
    header |= {"adapter rank": train.lora_rank, "remat": train.remat, "repeats": args.repeats}
    parts = build(ready, random_model(config, size) if size else None)
    with parts.reward:
        if args.against:
            work = capacity.work(config, size) if size else None
            print(benchmark.report(header, against.beside_torch(config, parts, args.repeats, work), args.json))
            return
        if rewards:
            rows = benchmark.epoch_rows(config, parts, parts.init(), args.repeats)
            for what, value, unit in random_rewards.speed(rewards, args.repeats):
                print(f"{what}: {value:.4g} {unit}", file=sys.stderr, flush=True)  # the next may take minutes
                rows.append((what, value, unit))
            print(benchmark.report(header, rows, args.json))
            return
        rows = benchmark.measure(config, parts, args.repeats, capacity.work(config, size) if size else None)
    print(benchmark.report(header, rows, args.json))
