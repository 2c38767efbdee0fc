"""How a run may end other than well, and which exceptions are the user's fault rather than a defect of ours.

Exit codes: 2 for wrong input (a ``ValueError`` that this package raised), 1 for a failure, 128 + signal for a signal.
"""

from __future__ import annotations

import dis
import pathlib
import signal as signals

PACKAGE = pathlib.Path(__file__).resolve().parent


class InputError(ValueError):
    """The user's input is wrong. Its message has one line for each fault: key, value received, rule, fix; exit code 2.

    Raised on purpose by this package alone; what a plug-in of the user's raises is wrapped in one at its boundary.
    """


class RunFailure(Exception):
    """A failure in mid-run, raised after the run was saved. Its message is one line; exit code 1."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved.

    Args:
      signum: the signal received, ``signal.SIGINT`` or ``signal.SIGTERM``.
      message: one line for the user, such as what was saved and how to go on.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        self.signum = int(signum)
        super().__init__(message or f"stopped by {signals.Signals(signum).name}")

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, as shells have it."""
        return 128 + self.signum


def raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package raised ``error``: it then speaks to the user.

    A ``ValueError`` that jax, numpy or the standard library raised is a defect and must keep its
    traceback. The innermost frame alone does not tell: jax removes its own frames. The instruction does.
    """
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    operation, arguments = code.co_code[traceback.tb_lasti : traceback.tb_lasti + 2]
    raising = dis.opname[operation] == "RAISE_VARARGS" and arguments > 0  # 0: "raise" alone passes another's on
    return raising and PACKAGE in pathlib.Path(code.co_filename).resolve().parents
