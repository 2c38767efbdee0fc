"""Serves a reward to training runs on this or another machine: `reward.name=remote` asks it.

  GET  /health    {"status": "ok", "reward": NAME, ...}
  POST /compute   {"prompt": [...], "image": [base64 PNG, ...], "metadata": [{...}, ...]} -> {"rewards": [...]}

The reward is one of this package, or your own function as package.module:function, which is called as
function(images, prompts, metadata). One request is computed at a time. A fault is answered as {"error": "..."} in one
line. Only this machine can reach the server unless --host and a token say otherwise; clients send the token as
`Authorization: Bearer TOKEN` (`reward.token`, or the environment variable DDPO_TOKEN on both sides).

examples:
  ddpo_jax serve --reward=clip_score --option scale=100
  ddpo_jax serve --reward=my_package.my_rewards:brightness --port=8001
  ddpo_jax train --config=configs/aesthetic.py --config.reward.name=remote \\
      --config.reward.url=http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import functools
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from ddpo_jax import errors
from ddpo_jax.commands import _cli as cli
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.rewards._shared import check as _check
from ddpo_jax.rewards._shared.groups import in_groups
from ddpo_jax.rollout.scoring import make_reward
from ddpo_jax.serving.compute import Compute
from ddpo_jax.serving.server import MEGABYTE, Server


def reward_config(name: str, options: Sequence[str], model: str) -> tuple[ConfigDict, Any]:
    """The section ``reward`` of the config that the flags describe, and the reward's member; starts JAX.

    Args:
      name: of the reward.
      options: ``key=value`` each.
      model: decides the options that are "auto", as ``config.model`` does.

    Raises:
      InputError: one line for each fault.
    """
    pairs = [("reward.name", name), ("model", model)]
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise errors.InputError(f"--option: received {option!r}; it must be key=value, such as batch_size=16")
        pairs.append((f"reward.{key}", value))
    config = default_config()
    override(config, pairs)
    resolved, members = resolve(config, *cli.start_jax())
    return resolved.reward, members.reward


def serve(args: argparse.Namespace) -> None:
    """Serves until a signal comes.

    Raises:
      InputError: the reward or the port cannot be had.
      Interrupted: a signal has ended it.
    """
    section, member = reward_config(args.reward, args.option, args.model)
    reward = in_groups(make_reward(section, member), 1, args.reward)
    score = functools.partial(_check.call, reward, name=args.reward)
    compute = Compute(score, args.reward, args.queue)
    stop = threading.Event()
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise errors.Interrupted(number, "stopped at once")
        received.append(number)
        stop.set()

    server = Server(
        compute.routes(),
        host=args.host,
        port=args.port,
        token=args.token,
        max_bytes=args.max_mb * MEGABYTE,
        threads=compute.threads,
    )
    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        chosen = ", ".join(f"{key}={value}" for key, value in section.items() if key not in ("name", "token", "wait_s"))
        print(f"serving {args.reward}{f' ({chosen})' if chosen else ''} at {server.url}", flush=True)
        stop.wait()
        logging.info("stopping: the request that is computed is finished first")
    finally:
        server.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise errors.Interrupted(received[0], f"stopped by {signal.Signals(received[0]).name}")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = cli.Parser("serve", __doc__)
    parser.add_argument("--reward", required=True, help="a reward's name, or package.module:function")
    parser.add_argument("--option", action="append", default=[], help="key=value of the reward; may be given again")
    parser.add_argument("--model", default="auto", help="decides options that are auto, as in training; auto")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; 8000")
    parser.add_argument("--token", default="", help="what clients must send; the environment variable DDPO_TOKEN")
    parser.add_argument("--queue", type=cli.positive, default=8, help="requests that may wait for their turn; 8")
    parser.add_argument("--max-mb", type=cli.positive, default=64, help="largest request, in megabytes; 64")
    args = parser.parse_args(argv)
    cli.show_log()
    serve(args)
