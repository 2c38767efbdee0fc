"""How a run may end other than well.

Exit codes: 2 for wrong input (``InputError``), 1 for a failure (``RunFailure``), 128 + signal for a signal
(``Interrupted``). Whatever else is raised is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Callable
from typing import Any

SAVED = "the epochs before are saved, the same command goes on from here"  # ends the line of many a RunFailure


class InputError(ValueError):
    """The user's input is wrong. Its message has one line for each fault: key, value received, rule, fix; exit code 2.

    Raised on purpose by this package alone; what a plug-in of the user's raises is wrapped in one at its boundary.
    """


class RunFailure(Exception):
    """A failure in mid-run, raised after the run was saved. Its message is one line; exit code 1."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved.

    Args:
      signum: the signal received, such as ``signal.SIGTERM``.
      message: one line for the user, such as what was saved and how to go on.
      at_once: this process alone was broken off, whatever others of the run do.
    """

    def __init__(self, signum: int, message: str = "", at_once: bool = False) -> None:
        self.signum, self.at_once = int(signum), at_once
        super().__init__(message or f"stopped by {signals.Signals(signum).name}")

    @property
    def exit_code(self) -> int:
        """129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM, as shells have it."""
        return 128 + self.signum


def one_line(error: BaseException) -> str:
    """The kind and the message of an exception on one line; an exception whose message cannot be shown is said so."""
    try:
        message = " ".join(str(error).split())
    except BaseException:  # the exception is the user's: its __str__ may raise too
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def plug_in(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` of the user's own, called at the boundary.

    Args:
      name: what is called, for the message, such as ``reward.name=my_package.my_module: make()``.
      function: may raise anything, ``SystemExit`` included.
      args: of the function.

    Raises:
      InputError: the function's own ``InputError`` as it is; anything else it raised as one line under ``name``.
    """
    try:
        return function(*args)
    except (InputError, Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise InputError(f"{name} raised {one_line(error)}") from error
