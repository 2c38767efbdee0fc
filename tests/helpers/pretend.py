"""Threads that take themselves for the processes of a run: for what processes tell each other, without devices."""

import threading

import numpy as np


def processes(monkeypatch, count, function):
    """What ``function(rank)`` returns, or the exception that it raises, in each of ``count`` processes."""
    here, barrier = threading.local(), threading.Barrier(count)
    shown, results = [None] * count, [None] * count

    def allgather(x, tiled=False):
        shown[here.rank] = np.array(x)
        barrier.wait(10)
        found = np.stack(shown)  # which refuses other shapes, as the real one does
        barrier.wait(10)
        return found

    monkeypatch.setattr("jax.process_count", lambda: count)
    monkeypatch.setattr("jax.process_index", lambda: here.rank)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", allgather)

    def run(rank):
        here.rank = rank
        try:
            results[rank] = function(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
