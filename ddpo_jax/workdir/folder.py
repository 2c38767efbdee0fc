"""The folder of a run: its config, its checkpoints, and what stands there at the end."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ddpo_jax.config import default_config
from ddpo_jax.config.defaults import FAMILIES, KEYS, OPEN
from ddpo_jax.config.keys import TYPE_NAMES, flatten, from_json, from_object, get, put, to_json
from ddpo_jax.config.model import read_json
from ddpo_jax.config.override import declared_type
from ddpo_jax.config.validate import RULES
from ddpo_jax.errors import InputError, Interrupted
from ddpo_jax.workdir import address, elsewhere, files, metrics

# What a resumed run may change, besides log.* and mesh.*.
FREE = (
    *("checkpoint.every", "checkpoint.keep", "checkpoint.folder", "train.microbatch_size", "reward.wait_s"),
    # Where a reward is asked or computed and how long it is waited for; what it says is taken to be the same there.
    *("reward.url", "reward.token", "reward.timeout_s", "reward.patience_s"),
    *("reward.host", "reward.port", "reward.lease_s"),
    *("reward.device", "reward.batch_size", "reward.weights_dir"),
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def diff_that_matters(
    old: ConfigDict, new: ConfigDict, where: str = "this folder", other: str = "--workdir"
) -> list[str]:
    """What forbids to go on with a run: one line for each key whose change would make another run of it.

    ``num_epochs`` may grow; ``log.*``, ``mesh.*`` and ``FREE`` may change: on other devices a run goes on with the same
    numbers up to rounding.

    Args:
      old: the config the run was started with.
      new: the config of this command, resolved in the same way.
      where: what holds the old run, for the message.
      other: what to change in order to keep both, for the message.
    """
    before, after = (flatten(from_json(to_json(config))) for config in (old, new))  # tuples in both
    lines = []
    for key in before | after:
        if is_free(key):
            continue
        was, now = before.get(key, "absent"), after.get(key, "absent")
        if was == now or (key == "num_epochs" and now > was):
            continue
        rule = "it may only grow" if key == "num_epochs" else "a run keeps it"
        lines.append(f"{key}: received {now!r}, but the run in {where} has {was!r}; {rule}; use another {other}")
    return lines


def read_config(workdir: str | os.PathLike[str], complete: bool = True) -> ConfigDict:
    """The config that a run was started with, as it was resolved; every key that is there has the right kind of value.

    Args:
      workdir: folder of the run, or its ``checkpoint.folder``, where a copy is.
      complete: refuse one that lacks keys, which another version of this package wrote. Keys that a resumed run may
        change get their defaults.

    Raises:
      InputError: there is none, or one line for each of its faults.
    """
    is_address = address.is_address(workdir)
    home = address.folder(workdir, "--workdir") if is_address else epath.Path(os.path.expanduser(workdir))
    path = home / "config.json"
    with address.reaching(home, "--workdir"):
        if not path.exists():
            raise InputError(
                f"--workdir: received '{workdir}'; there is no config.json in it; give the folder of a run"
            )
    config, reference = from_object(read_json(path), str(path)), default_config()
    given = flatten(config)
    absent = [key.name for key in KEYS if key.name not in given]
    for name in [name for name in absent if is_free(name) and name not in OPEN]:
        section = name.partition(".")[0]
        if isinstance(config[section] if section in config else None, ConfigDict):
            with config.unlocked():
                put(config, name, get(reference, name))
            absent.remove(name)
    names = {f"{family}.name" for family in FAMILIES}
    if missing := sorted(absent if complete else names & set(absent)):
        raise InputError(f"{path}: it lacks {', '.join(missing)}; it is of another version; use the one that wrote it")
    faults = []
    for key in (key for key in KEYS if key.name in given):
        value, kind = given[key.name], declared_type(reference, key.name)
        elements = {type(item) for item in value} if isinstance(value, tuple) else set()
        right = type(value) is kind or kind is float and type(value) is int
        if kind is not None and not (right and elements <= {str}):
            shown = " ".join(repr(value).split())[:80]
            faults.append(f"{path}, {key.name}: received {shown}; it must be {TYPE_NAMES.get(kind, kind)}")
        elif key.name in RULES and not RULES[key.name][0](value):
            faults.append(f"{path}, {key.name}: received {value!r}; {RULES[key.name][1]}")
    if faults:
        raise InputError("\n".join(f"{fault}; restore the file or use another folder" for fault in faults))
    return config


def refuse_other_run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes ``config.json``; a folder that holds another run is refused, naming what differs.

    So is a ``checkpoint.folder`` that holds another run, or not what this one has saved elsewhere.
    """
    path = workdir / "config.json"
    before = read_config(workdir) if path.exists() else None
    if before is not None and (faults := diff_that_matters(before, config)):
        raise InputError("\n".join(faults))
    if there := elsewhere.apart(config, workdir):
        _refuse_other_run_there(config, there)
    if before is not None and before.checkpoint.folder != config.checkpoint.folder:
        _refuse_to_start_anew(before, config, workdir)
    if before is None or to_json(before) != to_json(config):
        files.write_text(path, to_json(config))


def _refuse_other_run_there(config: ConfigDict, there: epath.Path) -> None:
    with address.reaching(there):
        if (there / "config.json").exists():
            if faults := diff_that_matters(read_config(there), config, str(there), "checkpoint.folder"):
                raise InputError("\n".join(faults))


def _refuse_to_start_anew(before: ConfigDict, config: ConfigDict, workdir: pathlib.Path) -> None:
    home = elsewhere.home(config, workdir)
    with address.reaching(home):
        if metrics.read_metrics(workdir) and not elsewhere.has_checkpoints(home):
            raise InputError(
                f"checkpoint.folder: received {config.checkpoint.folder!r}, where the run in this folder has saved "
                f"nothing; its checkpoints are in {elsewhere.home(before, workdir) / 'checkpoints'}; copy them to "
                f"{home / 'checkpoints'}, or leave the key as it was"
            )


def finish(workdir: pathlib.Path, there: epath.Path | None = None) -> None:
    """Draws the curve and prints how far the reward rose and where everything is: the result of a run.

    Where the run was evaluated, its last evaluation is told as well: the mean paired difference to the untrained model
    and its standard error. With epochs of few images that alone says how far it got.

    Args:
      workdir: folder of the run.
      there: the folder that its checkpoints are in, if another.
    """
    rows = metrics.read_metrics(workdir)
    if not rows:
        logging.info("%s has no %s any more: there is no curve to draw", workdir, metrics.FILE)
        return
    metrics.plot_curve(workdir / "reward.png", {workdir.name: rows})
    first, last = rows[0]["reward/mean"], rows[-1]["reward/mean"]
    rise = "reward not finite" if first is None or last is None else f"reward {first:.4g} -> {last:.4g}"
    result = f"{rise} in {rows[-1]['reward_queries']} queries"
    keys = ("eval/reward/difference", "eval/reward/standard_error")
    if paired := [row for row in rows if all(row.get(key) is not None for key in keys)]:
        gain, error = (paired[-1][key] for key in keys)
        when = "" if paired[-1] is rows[-1] else f" after {paired[-1]['reward_queries']}"
        result += f"; on equal prompts and noise {gain:+.3g} ± {error:.2g}{when}"
        if (deviations := paired[-1].get("eval/reward/deviations")) is not None:
            result += f" ({deviations:+.2f} standard deviations of the untrained model's)"
    elif first is not None and last is not None and rows[0].get("reward/std"):
        result += f" ({(last - first) / rows[0]['reward/std']:+.2f} standard deviations of the first epoch)"
    where = f"In {workdir}: reward.png, samples/, metrics.jsonl, TensorBoard events, checkpoints/"
    where += f" in {there}" if there else ""
    print(f"{result}. {where}", flush=True)


class Signals:
    """Notes SIGTERM, SIGINT and SIGHUP (a closed terminal), so that the epoch in progress can finish and be saved.

    A second one stops the run at once where ``stoppable`` allows it; elsewhere, such as in a save, it is only noted.
    What was ignored before (SIGHUP under nohup) stays so.

    Args:
      waits_for: says what the run waits for, for the log; empty if it is computing.
    """

    def __init__(self, waits_for: Callable[[], str]) -> None:
        self.received = 0
        self._waits_for = waits_for
        self._stoppable = False

    def __enter__(self) -> Signals:
        numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._old = {number: signal.signal(number, self._note) for number in numbers}
        return self

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Around what may be broken off at any moment, because the run can do it again."""
        self._stoppable = True
        try:
            yield
        finally:
            self._stoppable = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name, waits_for = signal.Signals(number).name, self._waits_for()
        if not self.received:
            self.received = number
            waiting = f" (it waits for {waits_for})" if waits_for else ""
            logging.warning("received %s: saving after this epoch%s; once more stops at once", name, waiting)
        elif self._stoppable:
            self._stoppable = False
            waiting = f" while it waited for {waits_for}" if waits_for else ""
            text = f"stopped at once{waiting}; the same command goes on from the last saved epoch"
            raise Interrupted(number, text, at_once=True)
        else:
            logging.warning("received %s: the run ends as soon as it is saved", name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def is_free(key: str) -> bool:
    """Whether a resumed run may change a key: it is not part of what the run computes."""
    return key.startswith(("log.", "mesh.")) or key in FREE
