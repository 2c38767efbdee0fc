"""For what another thread or process does in its own time."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether the condition holds, now or within so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
