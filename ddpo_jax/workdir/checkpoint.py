"""Checkpoints of a run: orbax behind one small class.

A checkpoint is a folder ``checkpoints/<epoch>`` that orbax writes under a temporary name and renames when it is
complete, so a process killed in mid-save leaves the earlier ones as they were. In a bucket, which cannot rename, it is
complete when ``commit_success.txt`` is there, which is written last. Inside: ``arrays`` (one entry per leaf,
named by its path in the tree, and ``checksums.json``, by which a byte that changed on disk is noticed) and ``reward``
(the mean reward, by which the best one is kept).

The number of a checkpoint is the number of *finished* epochs: a run that restores ``epoch`` goes on with that epoch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ddpo_jax.errors import InputError, Interrupted, RunFailure, one_line
from ddpo_jax.hosts import exchange
from ddpo_jax.workdir import address, checksums, files, named
from ddpo_jax.workdir.checksums import Damaged

__all__ = ["Checkpointer", "Damaged"]


REWARD = "reward.json"


class Checkpointer:
    """Saves and restores the state of a run.

    As a context manager it writes, when an exception ends the run, the epochs whose turn to be saved had not come.

    Args:
      workdir: folder of the run, or an address; checkpoints go to ``workdir/checkpoints``.
      every: epochs between saves.
      keep: how many of the newest to keep. The best by mean reward is kept as well.
      read_only: leave the folder as it is (a run may be writing there) and refuse to save.
      before_save: called by process 0 before each checkpoint is written; what it raises is why that cannot be.

    Raises:
      InputError: ``workdir/checkpoints`` cannot be a folder of checkpoints, or ``every`` or ``keep`` is below 1.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        every: int = 1,
        keep: int = 2,
        read_only: bool = False,
        before_save: Callable[[], None] | None = None,
    ):
        for key, value in (("checkpoint.every", every), ("checkpoint.keep", keep)):
            if value < 1:
                raise InputError(f"{key}: received {value}; expected an integer of at least 1")
        self.folder = address.folder(workdir) / "checkpoints"
        self._every, self._keep, self._read_only, self._before_save = every, keep, read_only, before_save
        self._held: tuple[int, dict[str, Any], float] | None = None  # for ``_write``: not on disk yet
        with address.reaching(self.folder):
            if read_only and not address.is_there(self.folder):
                raise InputError(f"checkpoints: no folder {self.folder}; give the --workdir of a run that has saved")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"checkpoints: cannot make the folder {self.folder}: {_cause(error)}") from error
        self._rewards: dict[int, float] = {}  # mean reward of each checkpoint
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        read_only = {
            "read_only": True,
            "create": False,
            "cleanup_tmp_directories": False,
            "save_interval_steps": 0,  # orbax warns of any other number
        }
        registry, handler = ocp.handlers.DefaultCheckpointHandlerRegistry(), _Arrays()
        for kind in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
            registry.add("arrays", kind, handler)
        registry.add("reward", ocp.args.JsonSave, ocp.JsonCheckpointHandler(filename=REWARD))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self._keep, self._rewards),
            enable_async_checkpointing=True,
            **(read_only if self._read_only else {"create": True, "cleanup_tmp_directories": True}),
        )
        opened = partial(ocp.CheckpointManager, self.folder, options=options, handler_registry=registry)
        try:
            try:
                manager = opened()
            except FileNotFoundError:  # orbax deletes what a torn save left in a bucket while it looks at it
                manager = opened()
        except Exception as error:  # orbax raises many kinds
            other = "checkpoint.folder" if address.is_address(self.folder) else "--workdir"
            fix = f"put that right, or use another {other}"
            raise InputError(f"checkpoints: {self.folder} cannot be opened: {_cause(error)}; {fix}") from error
        self._file = None if address.is_address(self.folder) else os.open(self.folder, os.O_RDONLY)
        for epoch in manager.all_steps():
            self._rewards[epoch] = _reward(self.folder / str(epoch))
        return manager

    def save(self, epoch: int, arrays: Any, reward_mean: float, force: bool = False) -> bool:
        """Starts writing a checkpoint and returns when the arrays may be changed or donated.

        Args:
          epoch: number of finished epochs; saved if it is a multiple of ``every``, else copied to the host: the updates
            that follow donate the arrays, and a failure in them would lose every epoch since the last checkpoint.
          arrays: any pytree of jax arrays and numpy arrays. Where several processes run, numpy arrays are process 0's.
          reward_mean: of the epoch just finished; ranks the checkpoints. Minus infinity: never the best of several.
          force: save whatever ``every`` says (the last epoch, a signal).

        Returns:
          Whether a save was started; False if it is not its turn or this epoch is already there.

        Raises:
          RunFailure: this checkpoint, or the one whose save was started before, cannot be written.
        """
        with self._writing():
            self._make_again()
            self._manager.check_for_errors()
            if epoch in self._manager.all_steps():
                return False
            stored = named.to_stored(arrays)
            if not force and epoch % self._every:
                copies = {name: named.to_host(leaf) for name, leaf in stored.items()}
                self._held = (epoch, copies, reward_mean)
                return False
            self._held = None
            return self._write(epoch, stored, reward_mean)

    def _write(self, epoch: int, stored: dict[str, Any], reward_mean: float) -> bool:
        if self._before_save is not None:
            with exchange.together(RunFailure), self._writing():
                if exchange.is_first():
                    self._before_save()
        self._rewards[epoch] = -math.inf if math.isnan(reward_mean) else float(reward_mean)
        reward = ocp.args.JsonSave({"reward_mean": self._rewards[epoch]})
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(stored), reward=reward)
        return self._manager.save(epoch, args=items, force=True)

    def _make_again(self) -> None:
        """Starts with an empty folder where the one that was opened is not any more."""
        if self._file is None or files.is_at(self._file, self.folder):
            return
        if not self.folder.parent.is_dir():
            raise RunFailure(f"{self.folder.parent} was removed or renamed while the run went on")
        logging.warning("%s was removed while the run went on: it is made again", self.folder)
        with contextlib.suppress(Exception):  # what it still had to write has no place any more
            self._manager.close()
        self.folder.mkdir(exist_ok=True)
        os.close(self._file)
        self._manager = self._open()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except RunFailure:
            raise
        except Exception as error:  # orbax and what it stands on raise many kinds
            raise RunFailure(
                f"a checkpoint cannot be written to {self.folder}: {_cause(error)}; mend that, and the same command "
                "goes on from the last one that is complete"
            ) from error

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The latest checkpoint that is not damaged as ``(epoch, arrays)``, or None if there is none at all.

        Damaged ones are renamed to ``<epoch>.damaged``, with a line in the log, because their epochs are run again.

        Args:
          like: a tree of the same structure, whose leaves say what is wanted: jax arrays (or ``jax.ShapeDtypeStruct``)
            their shape, dtype and sharding; numpy arrays their dtype and all but the leading length.

        Raises:
          InputError: the checkpoint is of another configuration, or all there are are damaged or not ours.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for epoch in reversed(self.epochs()):
            try:
                arrays = self.restore_epoch(epoch, like)
            except Damaged as error:
                damaged[epoch] = str(error)
                continue
            for number, fault in damaged.items():
                logging.warning("%s; the run goes on from epoch %d", fault, epoch)
                self._set_aside(number)
            return epoch, arrays
        if damaged:
            raise InputError(
                f"{damaged[max(damaged)]}; of all there are ({', '.join(map(str, damaged))}) none can be read; put one "
                f"back from a copy; to start anew use another --workdir, or delete {self.folder}"
            )
        return None

    def _set_aside(self, epoch: int) -> None:
        if not self._read_only:
            aside = self.folder / f"{epoch}.damaged"
            with exchange.together(RunFailure), self._writing():
                if exchange.is_first():
                    aside.rmtree(missing_ok=True)
                    (self.folder / str(epoch)).rename(aside)
            self._manager.reload()

    def restore_epoch(self, epoch: int, like: Any) -> Any:
        """The arrays of one checkpoint; see ``restore``.

        Raises:
          Damaged: it cannot be read.
          InputError: there is no such checkpoint, or it is of another configuration.
        """
        wanted = named.flatten(like)
        with self._reading(epoch):
            stored = {
                name: (tuple(entry.shape), np.dtype(entry.dtype))
                for name, entry in dict(self._manager.item_metadata(epoch)["arrays"].tree).items()
            }
            # orbax writes no array without elements: an empty buffer is wanted, and there is none.
            empty = {name for name, leaf in wanted.items() if name not in stored and named.is_empty(leaf)}
            named.compare(self.folder / str(epoch), {n: leaf for n, leaf in wanted.items() if n not in empty}, stored)
            restore_args = {name: named.restore_args(leaf) for name, leaf in wanted.items() if name not in empty}
            item = dict.fromkeys(restore_args, 0)
            values = self._manager.restore(
                epoch, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore(item, restore_args=restore_args))
            )["arrays"]
        leaves = [np.array(leaf) if name in empty else values[name] for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    @contextlib.contextmanager
    def _reading(self, epoch: int) -> Iterator[None]:
        """Around whatever reads a checkpoint; its files are verified first."""
        self.wait()
        folder = self.folder / str(epoch)
        if epoch not in self._manager.all_steps():
            raise InputError(f"checkpoints: no epoch {epoch} in {self.folder}; there are: {self.epochs()}")
        verified = False
        with exchange.together(Damaged, InputError):
            if exchange.is_first():
                verified = checksums.verify(folder / "arrays")
                if not verified and not (folder / "meta").is_dir():  # which versions wrote that wrote no checksums
                    raise Damaged(f"checkpoint {folder} is damaged: arrays/{checksums.FILE} is missing")
        verified = exchange.gather(verified)[0]
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # orbax raises many kinds for a folder that is not what it wrote
            kind = InputError if verified else Damaged  # as it was written: then something else is wrong
            raise kind(f"checkpoint {folder} cannot be read ({one_line(error)[:300]})") from error

    def read(self, epoch: int, prefix: str) -> dict[str, np.ndarray]:
        """Some arrays of one checkpoint, by name, whatever else it holds and whichever devices wrote it.

        Args:
          epoch: of the checkpoint.
          prefix: path of a subtree, such as ``state/params``; left out of the names.

        Returns:
          Host arrays by the rest of their path; empty if there are none.

        Raises:
          Damaged: it cannot be read.
          InputError: there is no such checkpoint.
        """
        with self._reading(epoch):
            stored = dict(self._manager.item_metadata(epoch)["arrays"].tree)
            names = [name for name in stored if name.startswith(f"{prefix}/")]
            if not names:
                return {}
            arguments = ocp.args.PyTreeRestore(
                dict.fromkeys(names, 0),
                restore_args=dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)),
                partial_restore=True,
            )
            values = self._manager.restore(epoch, args=ocp.args.Composite(arrays=arguments))["arrays"]
        return {name[len(prefix) + 1 :]: values[name] for name in names}

    def epochs(self) -> list[int]:
        """The complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest_epoch(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def best_epoch(self) -> int | None:
        """The checkpoint with the highest mean reward."""
        return max(self.epochs(), key=lambda epoch: (self._rewards.get(epoch, -math.inf), epoch), default=None)

    def wait(self) -> None:
        """Blocks until a save in progress is complete.

        Raises:
          RunFailure: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, see ``wait``, and frees the writer's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # of the failed save once more
                self._manager.close()
            if self._file is not None:
                os.close(self._file)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not _of_all(error):
            return  # to wait for processes that are gone, or go on without this one, may take for ever
        try:
            try:
                if error is not None and self._held is not None:
                    with self._writing():
                        self._make_again()
                        epoch, copies, reward = self._held
                        self._write(epoch, {name: copy() for name, copy in copies.items()}, reward)
            finally:
                self.close()
        except RunFailure as failure:
            if not isinstance(error, RunFailure | Interrupted):
                raise
            if str(failure) not in str(error):
                raise RunFailure(f"{error}; but {failure}") from error


def _of_all(error: BaseException) -> bool:
    """Whether all processes of the run end by this error, so that they can still write together."""
    stopped = isinstance(error, Interrupted) and not error.at_once
    return jax.process_count() == 1 or stopped or isinstance(error, InputError | RunFailure)


class _Arrays(ocp.PyTreeCheckpointHandler):
    """Writes checksums beside the arrays, as part of what is renamed when it is complete."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        if exchange.is_first():
            checksums.write(epath.Path(directory))


def _cause(error: BaseException) -> str:
    """What a person needs of the exception: the system's words or the bucket's, out of tensorstore's long texts."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, OSError) and known.strerror:
            return known.strerror
        if found := re.search(r"([^:]+) \[(?:os_error_code|http_response_code|tensorstore_spec)=", str(known)):
            return found.group(1).strip()
        known = known.__cause__ or known.__context__
    return one_line(error)[:300]


class _NewestAndBest:
    """Which checkpoints orbax keeps."""

    def __init__(self, keep: int, rewards: dict[int, float]):
        self._keep, self._rewards = keep, rewards

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Of each checkpoint, oldest first."""
        epochs = [info.step for info in checkpoints]
        best = max(epochs, key=lambda epoch: (self._rewards.get(epoch, -math.inf), epoch), default=None)
        return [epoch == best or epoch in epochs[-self._keep :] for epoch in epochs]


def _reward(folder: epath.Path) -> float:
    """The mean reward of a checkpoint; minus infinity if nothing says it: then it is never the best of several."""
    earlier = folder / "metrics" / "metrics"  # where earlier versions kept it, and where orbax insists on reading it
    path = earlier if earlier.exists() else folder / "reward" / REWARD
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["reward_mean"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -math.inf
