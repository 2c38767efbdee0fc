"""The training loop: sample, score, weigh, update, write. One epoch is one page."""

from __future__ import annotations

import pathlib

from absl import logging

from ddpo_jax.config.ready import Ready
from ddpo_jax.errors import Interrupted, RunFailure
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.rollout.scoring import RewardError
from ddpo_jax.training.build import build, describe
from ddpo_jax.training.epoch import branch_step, refresh, update
from ddpo_jax.training.state import restore, save, show_fixed
from ddpo_jax.workdir import checkpoint, metrics
from ddpo_jax.workdir.folder import Signals, finish, refuse_other_run


def train(ready: Ready, workdir: pathlib.Path) -> None:
    """Trains (or resumes) a run in ``workdir``, the folder it is kept in.

    Raises:
      InputError: the input is wrong; nothing was trained.
      RunFailure: something broke in mid-run; the last complete epoch is saved.
      Interrupted: a signal asked to stop; the last complete epoch is saved.
    """
    config = ready.config
    refuse_other_run(config, workdir)
    parts = build(ready)
    stats = PromptStats()
    saver = checkpoint.Checkpointer(workdir, config.checkpoint.every, config.checkpoint.keep)
    state, start = restore(saver, parts, stats)
    if start >= config.num_epochs:
        logging.info("%s is finished: %d of %d epochs; raise num_epochs to go on", workdir, start, config.num_epochs)
        saver.close()
        parts.reward.close()
        if not (workdir / "reward.png").exists():  # stopped after the last epoch was saved
            finish(workdir)
        return
    logging.info("%s", describe(parts, config))
    with saver, parts.reward, metrics.Writer(workdir, start) as writer, Signals() as signals:
        progress = metrics.Progress(config.num_epochs, start)
        if start == 0:
            show_fixed(writer, parts, config, state, 0)
        for epoch in range(start, config.num_epochs):
            try:
                progress.phase("sampling")
                state, behaviour = refresh(state, parts.traits, epoch)
                branch = branch_step(parts, config, epoch)
                rollout = parts.collector.collect(epoch, behaviour, branch)
            except (RewardError, ValueError) as error:  # the reward, or the user's prompt function
                if epoch == start and isinstance(error, ValueError):
                    raise
                raise RunFailure(f"epoch {epoch}: {error}; saved, the same command goes on from here") from error
            progress.phase("updating")
            state, row = update(parts, config, state, stats, rollout, epoch)
            row = {"epoch": epoch, "reward_queries": (epoch + 1) * len(rollout.prompts)} | row
            writer.write(row)
            if config.log.images_every and epoch % config.log.images_every == 0:
                shown = slice(config.log.num_images)
                writer.images(epoch, rollout.images[shown], rollout.prompts[shown], rollout.rewards[shown])
            last = epoch + 1 == config.num_epochs
            if last:  # before the save: a process that is killed here draws them when it resumes
                show_fixed(writer, parts, config, state, epoch + 1)
            save(saver, parts, state, stats, epoch + 1, row["reward/mean"], force=last or signals.received > 0)
            progress.update(row)
            if signals.received:
                raise Interrupted(signals.received, f"stopped after epoch {epoch}; the same command goes on from there")
        progress.close()
    finish(workdir)
