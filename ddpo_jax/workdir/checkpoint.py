"""Checkpoints of a run: orbax behind one small class.

A checkpoint is a folder ``checkpoints/<epoch>`` that orbax writes under a temporary name and renames when it is
complete, so a process killed in mid-save leaves the earlier ones as they were. Inside: ``arrays`` (one entry per leaf,
named by its path in the tree), ``meta`` (JSON) and ``metrics`` (the mean reward, by which the best one is kept).

The number of a checkpoint is the number of *finished* epochs: a run that restores ``epoch`` goes on with that epoch.
"""

from __future__ import annotations

import os
import pathlib
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ddpo_jax.errors import InputError


class Checkpointer:
    """Saves and restores the state of a run.

    As a context manager it writes, when an exception ends the run, the epochs whose turn to be saved had not come.

    Args:
      workdir: folder of the run; checkpoints go to ``workdir/checkpoints``.
      every: epochs between saves.
      keep: how many of the newest to keep. The best by mean reward is kept as well.
      read_only: leave the folder as it is (a run may be writing there) and refuse to save.

    Raises:
      InputError: ``workdir/checkpoints`` cannot be a folder of checkpoints, or ``every`` or ``keep`` is below 1.
    """

    def __init__(self, workdir: str | os.PathLike[str], every: int = 1, keep: int = 2, read_only: bool = False):
        for key, value in (("checkpoint.every", every), ("checkpoint.keep", keep)):
            if value < 1:
                raise InputError(f"{key}: received {value}; expected an integer of at least 1")
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._every = every
        self._held: tuple[Any, ...] | None = None  # arguments of ``_write``: an epoch that is not on disk
        if read_only and not self.folder.is_dir():
            raise InputError(f"checkpoints: no folder {self.folder}; give the --workdir of a run that has saved")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"checkpoints: cannot make the folder {self.folder}: {error.strerror}") from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=_reward, n=1)]
            ),
            best_fn=_reward,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=True,
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={"arrays": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def save(self, epoch: int, arrays: Any, meta: dict[str, Any], reward_mean: float, force: bool = False) -> bool:
        """Starts writing a checkpoint and returns when the arrays may be changed or donated.

        Args:
          epoch: number of finished epochs; saved if it is a multiple of ``every``, else copied to the host: the updates
            that follow donate the arrays, and a failure in them would lose every epoch since the last checkpoint.
          arrays: any pytree of jax arrays, typed PRNG keys and numpy arrays. Where several processes run, numpy arrays
            are process 0's.
          meta: what JSON can hold.
          reward_mean: of the epoch just finished; ranks the checkpoints. Minus infinity: never the best of several.
          force: save whatever ``every`` says (the last epoch, a signal).

        Returns:
          Whether a save was started; False if it is not its turn or this epoch is already there.
        """
        if epoch in self._manager.all_steps():
            return False
        stored, empty = _to_stored(arrays)
        if not force and epoch % self._every:
            copies = {name: np.array(leaf) if isinstance(leaf, jax.Array) else leaf for name, leaf in stored.items()}
            self._held = (epoch, copies, empty, meta, reward_mean)
            return False
        self._held = None
        return self._write(epoch, stored, empty, meta, reward_mean)

    def _write(
        self, epoch: int, stored: dict[str, Any], empty: dict[str, Any], meta: dict[str, Any], reward_mean: float
    ) -> bool:
        return self._manager.save(
            epoch,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(stored),
                meta=ocp.args.JsonSave({"meta": meta, "empty": empty}),
            ),
            metrics={"reward_mean": float(reward_mean)},
            force=True,
        )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The latest complete checkpoint as ``(epoch, arrays, meta)``, or None if there is none.

        Args:
          like: a tree of the same structure, whose leaves say what is wanted: jax arrays (or ``jax.ShapeDtypeStruct``)
            their shape, dtype and sharding; numpy arrays their dtype and all but the leading length.

        Raises:
          InputError: the checkpoint is damaged, not ours, or of another configuration.
        """
        epoch = self.latest_epoch()
        return None if epoch is None else (epoch, *self.restore_epoch(epoch, like))

    def restore_epoch(self, epoch: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """``(arrays, meta)`` of one checkpoint; see ``restore``."""
        self.wait()
        folder = self.folder / str(epoch)
        if epoch not in self._manager.all_steps():
            raise InputError(f"checkpoints: no epoch {epoch} in {self.folder}; there are: {self.epochs()}")
        try:
            described = self._manager.restore(epoch, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            meta, empty = described["meta"], described["empty"]
            stored_shapes = {
                name: (tuple(entry.shape), np.dtype(entry.dtype))
                for name, entry in dict(self._manager.item_metadata(epoch)["arrays"].tree).items()
            }
        except Exception as error:  # orbax raises many kinds for a folder that is not what it wrote
            raise InputError(_damaged(folder, error)) from error
        stored_shapes |= {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in empty.items()}
        wanted = _flatten(like)
        _compare(folder, wanted, stored_shapes)
        restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items() if name not in empty}
        item = {name: 0 for name in restore_args}
        try:
            values = self._manager.restore(
                epoch, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore(item, restore_args=restore_args))
            )["arrays"]
        except Exception as error:
            raise InputError(_damaged(folder, error)) from error
        values |= {name: np.zeros(*stored_shapes[name]) for name in empty}
        leaves = [_from_stored(values[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta

    def read(self, epoch: int, prefix: str) -> dict[str, np.ndarray]:
        """Some arrays of one checkpoint, by name, whatever else it holds and whichever devices wrote it.

        Args:
          epoch: of the checkpoint.
          prefix: path of a subtree, such as ``state/params``; left out of the names.

        Returns:
          Host arrays by the rest of their path; empty if there are none.

        Raises:
          InputError: no such checkpoint, or it is damaged.
        """
        self.wait()
        if epoch not in self._manager.all_steps():
            raise InputError(f"checkpoints: no epoch {epoch} in {self.folder}; there are: {self.epochs()}")
        try:
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
        except Exception as error:  # orbax raises many kinds for a folder that is not what it wrote
            raise InputError(_damaged(self.folder / str(epoch), error)) from error
        return {name[len(prefix) + 1 :]: values[name] for name in names}

    def epochs(self) -> list[int]:
        """The complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest_epoch(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def best_epoch(self) -> int | None:
        """The checkpoint with the highest mean reward."""
        return self._manager.best_step()

    def wait(self) -> None:
        """Blocks until a save in progress is complete; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the writer's threads."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None and self._held is not None:
                self._write(*self._held)
        finally:
            self.close()


def _reward(metrics: dict[str, float]) -> float:
    return metrics["reward_mean"]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _to_stored(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What orbax writes, and the shapes of the arrays without elements, which it refuses to write."""
    stored: dict[str, Any] = {}
    empty: dict[str, Any] = {}
    for name, leaf in _flatten(tree).items():
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array):
            leaf = np.array(leaf)  # a copy: the caller may go on writing into its own
        elif leaf.is_fully_replicated and jax.process_count() == 1:
            leaf = leaf.addressable_data(0)  # of a replicated array orbax has every device cut and write a slice
        if leaf.size:
            stored[name] = leaf
        else:
            empty[name] = [list(leaf.shape), leaf.dtype.name]
    return stored, empty


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _from_stored(value: Any, leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
    return value


def _compare(folder: pathlib.Path, wanted: dict[str, Any], stored: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises InputError that lists what is missing, left over, or of another shape or dtype."""
    faults = [f"missing: {name}" for name in wanted if name not in stored]
    faults += [f"unexpected: {name}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        leaf = wanted[name]
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        on_device = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        leaf = leaf if on_device else np.asarray(leaf)
        shape, dtype = stored[name]
        free = 0 if on_device or not leaf.ndim else 1  # a host array's leading length (a replay buffer) may differ
        if (len(shape), shape[free:], dtype) != (leaf.ndim, leaf.shape[free:], leaf.dtype):
            faults.append(f"{name}: stored {dtype}{list(shape)}, expected {leaf.dtype}{list(leaf.shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise InputError(f"checkpoint {folder} is of another configuration: {shown}. Use another --workdir.")


def _damaged(folder: pathlib.Path, error: Exception) -> str:
    cause = " ".join(str(error).split())[:300]
    return (
        f"checkpoint {folder} cannot be read ({type(error).__name__}: {cause}). If it is not of this run, use another "
        f"--workdir; if it is damaged, delete that folder and the run resumes from the one before."
    )
