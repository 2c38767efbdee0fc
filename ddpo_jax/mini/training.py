"""The one training loop of the miniature's networks: resumable, reproducible, with progress.

A :class:`Stage` says what is trained (a module, a batch of numpy arrays per step, a loss); :func:`train` does the rest.
All randomness is a function of (seed, stage, step), so a run that was stopped continues as if it never had been.
"""

from __future__ import annotations

import dataclasses
import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError
from ddpo_jax.workdir import files

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One network of the miniature and how it is trained.

    Attributes:
      name: folder name in the work directory and stream of the random numbers.
      init: makes the module with fresh parameters; parameters are all its state.
      make_batch: (generator, batch size) -> arrays with the batch as the leading axis; runs on a host thread.
      loss: (module, batch, key) -> (scalar, {metric: scalar}).
      steps, batch_size, learning_rate: length and step size (linear warm-up, then cosine to zero).
      weight_decay: of AdamW, on matrices and kernels only.
      ema_decay: 0 keeps the last parameters, otherwise the stage delivers their exponential moving average.
      chunk: steps between two looks at the metrics.
      checkpoint_every: steps between checkpoints, rounded up to whole chunks.
    """

    name: str
    init: Callable[[nnx.Rngs], nnx.Module]
    make_batch: Callable[[np.random.Generator, int], Arrays]
    loss: Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    ema_decay: float = 0.0
    chunk: int = 20
    checkpoint_every: int = 200
    warmup: int = 100

    def signature(self, seed: int) -> dict[str, float | int | str]:
        """What must agree for a checkpoint to be continued."""
        return {
            "seed": seed,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "ema_decay": self.ema_decay,
        }


def stream(seed: int, name: str, step: int) -> np.random.Generator:
    """Host randomness of one step of one stage."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), step])


def write_atomically(path: Path, arrays: Arrays) -> None:
    """An ``.npz`` that is there as a whole or not at all."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes a value for allow_pickle


def _pack(tree: Any, prefix: str) -> Arrays:
    return {f"{prefix}{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def _unpack(tree: Any, arrays: Any, prefix: str, path: Path) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    loaded = []
    for i, leaf in enumerate(leaves):
        key = f"{prefix}{i:05d}"
        if key not in arrays or arrays[key].shape != jnp.shape(leaf):
            raise InputError(f"{path}: does not fit this network (at {key}); delete the file or use a new --workdir")
        loaded.append(jnp.asarray(arrays[key], leaf.dtype))
    return jax.tree.unflatten(structure, loaded)


def trained(stage: Stage, workdir: Path, seed: int) -> Any:  # the nnx.Module that the stage makes
    """The stage's module with the parameters of its newest checkpoint (averaged ones if the stage averages)."""
    path = workdir / stage.name / "checkpoint.npz"
    if not path.exists():
        raise InputError(f"--stages: needs the stage {stage.name!r} first (no {path}); add it to --stages")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: stage.init(nnx.Rngs(seed))))
    with np.load(path) as arrays:
        params = _unpack(params, arrays, "ema" if stage.ema_decay else "params", path)
    return nnx.merge(graphdef, params)


def finished(stage: Stage, workdir: Path, seed: int) -> bool:
    """Whether the stage was trained to its end with these settings."""
    record = workdir / stage.name / "stage.json"
    path = workdir / stage.name / "checkpoint.npz"
    if not record.exists() or not path.exists():
        return False
    _check_signature(stage, record, seed)
    with np.load(path) as arrays:
        return int(arrays["step"]) >= stage.steps


def _check_signature(stage: Stage, record: Path, seed: int) -> None:
    old = read_json(record)
    new = stage.signature(seed)
    changed = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
    if changed:
        detail = ", ".join(f"{key} was {was}, now {now}" for key, (was, now) in changed.items())
        raise InputError(
            f"--workdir: {record.parent} was started with other settings ({detail}); use another --workdir or delete it"
        )


def _prefetch(stage: Stage, seed: int, first: int) -> Iterator[list[Arrays]]:
    """Yields the batches of one chunk after another, made ahead on a host thread."""
    ready: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for start in range(first, stage.steps, stage.chunk):
                steps = range(start, min(start + stage.chunk, stage.steps))
                if not put([stage.make_batch(stream(seed, stage.name, step), stage.batch_size) for step in steps]):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name=f"prefetch-{stage.name}", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with global-norm clipping, warm-up and cosine decay; biases and norms are not decayed."""
    warmup = min(stage.warmup, max(1, stage.steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, warmup, max(stage.steps, warmup + 1))
    matrices = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=stage.weight_decay, mask=matrices),
    )


def train(
    stage: Stage,
    workdir: Path,
    seed: int,
    *,
    on_checkpoint: Callable[[nnx.Module, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> nnx.Module:
    """Trains a stage, from its checkpoint if there is one, and returns the module it delivers.

    Args:
      on_checkpoint: called with the deliverable module and the step after every checkpoint (sample pictures).
      log: receives one line per checkpoint; the progress bar goes to standard error when that is a terminal.
    """
    folder = workdir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    record, path = folder / "stage.json", folder / "checkpoint.npz"
    if record.exists():
        _check_signature(stage, record, seed)
    files.write_json(record, stage.signature(seed))

    graphdef, params = nnx.split(nnx.jit(lambda: stage.init(nnx.Rngs(seed)))())
    tx = optimizer(stage)
    state = {"params": params, "opt": tx.init(params)}
    if stage.ema_decay:
        state["ema"] = jax.tree.map(jnp.array, params)
    step = 0
    if path.exists():
        with np.load(path) as arrays:
            step = int(arrays["step"])
            state = {key: _unpack(tree, arrays, key, path) for key, tree in state.items()}
        log(f"{stage.name}: continues at step {step} of {stage.steps}")
    base_key = jax.random.key(zlib.crc32(f"{seed}/{stage.name}".encode()))

    # One compiled step, called from Python: on CPU a convolution's gradients are slower inside a compiled loop.
    @partial(jax.jit, donate_argnums=0)
    def one_step(state, step, batch):
        def objective(params):
            return stage.loss(nnx.merge(graphdef, params), batch, jax.random.fold_in(base_key, step))

        (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
        if stage.ema_decay:
            # The average starts with the parameters themselves: a short memory that grows to 1 / (1 - decay).
            decay = jnp.minimum(stage.ema_decay, (1.0 + step) / (10.0 + step))
            new["ema"] = jax.tree.map(lambda old, now: decay * old + (1 - decay) * now, state["ema"], new["params"])
        return new, {"loss": value, **metrics}

    def deliver() -> nnx.Module:  # a copy: the state's buffers are donated to the next step
        return nnx.merge(graphdef, jax.tree.map(jnp.array, state["ema" if stage.ema_decay else "params"]))

    progress = Progress(stage.name, step, stage.steps)
    saved = step
    for batches in _prefetch(stage, seed, step):
        collected = []
        for batch in batches:
            state, metrics = one_step(state, jnp.int32(step), batch)
            collected.append(metrics)
            step += 1
        metrics = {key: float(np.mean([m[key] for m in collected])) for key in collected[0]}  # waits for the device
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{stage.name}: the loss is {metrics['loss']} at step {step}")
        progress.update(step, metrics)
        if step - saved >= stage.checkpoint_every or step >= stage.steps:
            arrays = {"step": np.int64(step)}
            for key, tree in state.items():
                arrays.update(_pack(tree, key))
            write_atomically(path, arrays)
            saved = step
            log(progress.line())
            if on_checkpoint is not None:
                on_checkpoint(deliver(), step)
    progress.close()
    return deliver()


class Progress:
    """A one-line progress bar with speed, remaining time and the smoothed metrics."""

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.first, self.step, self.steps = name, step, step, steps
        self.metrics: dict[str, float] = {}
        self.started: float | None = None  # set after the first chunk, so that compilation does not count
        self.begun = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        for key, value in metrics.items():
            self.metrics[key] = value if key not in self.metrics else 0.7 * self.metrics[key] + 0.3 * value
        if self.started is None:
            self.started, self.first = time.monotonic(), step
        if self.terminal:
            sys.stderr.write("\r" + self.line() + " ")
            sys.stderr.flush()

    def line(self) -> str:
        done = self.step - self.first
        now = time.monotonic()
        speed = f"compiled in {(self.started or now) - self.begun:.0f} s"
        if done > 0 and self.started is not None:
            per_step = (now - self.started) / done
            speed = f"{1e3 * per_step:.0f} ms/step, {per_step * (self.steps - self.step) / 60:.1f} min left"
        values = "  ".join(f"{key} {value:.4g}" for key, value in self.metrics.items())
        return f"{self.name} {self.step}/{self.steps}  {speed}  {values}"

    def close(self) -> None:
        if self.terminal:
            sys.stderr.write("\n")
