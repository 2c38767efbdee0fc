"""The training loop: sample, score, weigh, update, write. One epoch is one page."""

from __future__ import annotations

import contextlib
import pathlib

import jax
from absl import logging

from ddpo_jax import sharding
from ddpo_jax.config.keys import to_json
from ddpo_jax.config.ready import Ready
from ddpo_jax.config.validate import doubts
from ddpo_jax.errors import SAVED, InputError, Interrupted, RunFailure
from ddpo_jax.hosts import exchange
from ddpo_jax.hosts import rows as hosts
from ddpo_jax.hosts.runtime import others_alive
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.rollout.scoring import RewardError
from ddpo_jax.training.build import build, describe
from ddpo_jax.training.epoch import branch_step, refresh, update
from ddpo_jax.training.record import Record
from ddpo_jax.training.state import restore, save, show_fixed
from ddpo_jax.workdir import checkpoint, elsewhere
from ddpo_jax.workdir.folder import Signals, finish, refuse_other_run
from ddpo_jax.workdir.lock import Lock


def train(ready: Ready, workdir: pathlib.Path) -> None:
    """Trains (or resumes) a run in ``workdir``, the folder it is kept in.

    Raises:
      InputError: the input is wrong, or another run is going on in the folder; nothing was trained.
      RunFailure: something broke in mid-run; the last complete epoch is saved.
      Interrupted: a signal asked to stop; the last complete epoch is saved.
    """
    exchange.require_same("config", to_json(ready.config))
    with contextlib.ExitStack() as stack:
        lock, there = None, elsewhere.apart(ready.config, workdir)
        copies = elsewhere.Copies(there, workdir) if there else None
        with exchange.together(InputError, RunFailure):
            if exchange.is_first():
                lock = stack.enter_context(Lock(workdir))
                refuse_other_run(ready.config, workdir)
                if copies:
                    copies.take()
        with others_alive():
            if _train(ready, workdir, lock, copies) and exchange.is_first():
                finish(workdir, there)


def _train(ready: Ready, workdir: pathlib.Path, lock: Lock | None, copies: elsewhere.Copies | None) -> bool:
    """Whether there is something to show: not if the run was finished before and its curve is there."""
    config = ready.config
    parts = build(ready)
    stats = PromptStats()
    saver = checkpoint.Checkpointer(
        elsewhere.home(config, workdir),
        *(config.checkpoint.every, config.checkpoint.keep),
        before_save=copies.give if copies else None,
    )
    with Signals(parts.reward.waits_for) as signals, saver, parts.reward:
        if parts.evaluation:  # before ``restore``, which frees the untrained parameters
            with signals.stoppable():
                parts.evaluation.start(sharding.put_params(parts.model.params, parts.mesh, parts.sampler.rules))
        state, start = restore(saver, parts, stats)
        if start >= config.num_epochs:
            logging.info(
                "%s is finished: %d of %d epochs; raise num_epochs to go on", workdir, start, config.num_epochs
            )
            return not (workdir / "reward.png").exists()  # stopped after the last epoch was saved
        logging.info("%s", describe(parts, config))
        for doubt in doubts(config, parts.traits):
            logging.warning("%s", doubt)
        with Record(workdir, lock, start, config, parts.reward.waits_for) as record:
            if start == 0:
                show_fixed(record, parts, config, state, 0)
            for epoch in range(start, config.num_epochs):
                if signal := max(exchange.gather(signals.received)):  # of one process: all stop before the same epoch
                    raise Interrupted(signal, f"stopped before epoch {epoch}; the same command goes on there")
                with signals.stoppable(), record.epoch(epoch):
                    try:
                        record.stage("sampling")
                        state, behaviour = refresh(state, parts.traits, epoch)
                        branch = branch_step(parts, config, epoch)
                        rollout = parts.collector.collect(epoch, behaviour, branch)
                    except (RewardError, InputError) as error:  # the reward, or the user's prompt function
                        if epoch == start and isinstance(error, InputError):
                            raise
                        raise RunFailure(f"epoch {epoch}: {error}; {SAVED}") from error
                    record.stage("updating")
                    # Only what is put on the devices on purpose goes there; anything else would wait for them.
                    with jax.transfer_guard_host_to_device("disallow"):
                        state, row = update(parts, config, state, stats, rollout, epoch)
                    if parts.evaluation:
                        row |= parts.evaluation.after(epoch + 1, config.num_epochs, state.params)
                record.stage("writing")
                row = {"epoch": epoch, "reward_queries": (epoch + 1) * len(rollout.prompts)} | row
                record.row(row, len(rollout.prompts))
                if config.log.images_every and epoch % config.log.images_every == 0:
                    shown = slice(config.log.num_images)
                    images = hosts.whole(rollout.images[shown])
                    record.images(epoch, images, rollout.prompts[shown], rollout.rewards[shown])
                last = epoch + 1 == config.num_epochs
                if last:  # before the save: a process that is killed here draws them when it resumes
                    show_fixed(record, parts, config, state, epoch + 1)
                record.stage("saving")
                signal = max(exchange.gather(signals.received))
                save(saver, parts, state, stats, epoch + 1, row["reward/mean"], force=last or signal > 0)
                record.done(row)
                if signal:
                    raise Interrupted(signal, f"stopped after epoch {epoch}; the same command goes on from there")
    return True
