"""The training loop: sample, score, weigh, update, write. One epoch is one page."""

from __future__ import annotations

import pathlib

import jax
from absl import logging

from ddpo_jax import sharding
from ddpo_jax.config.ready import Ready
from ddpo_jax.config.validate import doubts
from ddpo_jax.errors import InputError, Interrupted, RunFailure
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.rollout.scoring import RewardError
from ddpo_jax.training.build import build, describe
from ddpo_jax.training.epoch import branch_step, refresh, update
from ddpo_jax.training.state import restore, save, show_fixed
from ddpo_jax.training.watch import Watch
from ddpo_jax.workdir import checkpoint, metrics
from ddpo_jax.workdir.folder import Signals, finish, refuse_other_run
from ddpo_jax.workdir.lock import Lock
from ddpo_jax.workdir.tracker import Tracker


def train(ready: Ready, workdir: pathlib.Path) -> None:
    """Trains (or resumes) a run in ``workdir``, the folder it is kept in.

    Raises:
      InputError: the input is wrong, or another run is going on in the folder; nothing was trained.
      RunFailure: something broke in mid-run; the last complete epoch is saved.
      Interrupted: a signal asked to stop; the last complete epoch is saved.
    """
    with Lock(workdir) as lock:
        refuse_other_run(ready.config, workdir)
        if _train(ready, workdir, lock):
            finish(workdir)


def _train(ready: Ready, workdir: pathlib.Path, lock: Lock) -> bool:
    """Whether there is something to show: not if the run was finished before and its curve is there."""
    config = ready.config
    parts = build(ready)
    stats = PromptStats()
    saver = checkpoint.Checkpointer(workdir, config.checkpoint.every, config.checkpoint.keep)
    with Signals(parts.reward.waits_for) as signals, saver, parts.reward:
        if parts.evaluation:  # before ``restore``, which frees the untrained parameters
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
        watch = Watch(workdir, config.log, parts.reward.waits_for)
        tracker = Tracker(workdir, config.log.wandb, config) if config.log.wandb else None
        with metrics.Writer(workdir, start, tracker) as writer, watch:
            progress = metrics.Progress(config.num_epochs, start)
            if start == 0:
                show_fixed(writer, parts, config, state, 0)
            for epoch in range(start, config.num_epochs):
                if signals.received:  # before the first epoch began
                    raise Interrupted(signals.received, f"stopped before epoch {epoch}; the same command goes on there")
                with signals.stoppable(), watch.epoch(epoch):
                    try:
                        progress.phase("sampling")
                        watch.stage("sampling")
                        state, behaviour = refresh(state, parts.traits, epoch)
                        branch = branch_step(parts, config, epoch)
                        rollout = parts.collector.collect(epoch, behaviour, branch)
                    except (RewardError, InputError) as error:  # the reward, or the user's prompt function
                        if epoch == start and isinstance(error, InputError):
                            raise
                        raise RunFailure(
                            f"epoch {epoch}: {error}; the epochs before are saved, the same command goes on from here"
                        ) from error
                    progress.phase("updating")
                    watch.stage("updating")
                    # Only what is put on the devices on purpose goes there; anything else would wait for them.
                    with jax.transfer_guard_host_to_device("disallow"):
                        state, row = update(parts, config, state, stats, rollout, epoch)
                    if parts.evaluation:
                        row |= parts.evaluation.after(epoch + 1, config.num_epochs, state.params)
                watch.stage("writing")
                lock.check()
                row |= watch.row(len(rollout.prompts))
                row = {"epoch": epoch, "reward_queries": (epoch + 1) * len(rollout.prompts)} | row
                writer.write(row)
                if config.log.images_every and epoch % config.log.images_every == 0:
                    shown = slice(config.log.num_images)
                    writer.images(epoch, rollout.images[shown], rollout.prompts[shown], rollout.rewards[shown])
                last = epoch + 1 == config.num_epochs
                if last:  # before the save: a process that is killed here draws them when it resumes
                    show_fixed(writer, parts, config, state, epoch + 1)
                watch.stage("saving")
                save(saver, parts, state, stats, epoch + 1, row["reward/mean"], force=last or signals.received > 0)
                progress.update(row)
                if signals.received:
                    raise Interrupted(
                        signals.received, f"stopped after epoch {epoch}; the same command goes on from there"
                    )
            progress.close()
    return True
