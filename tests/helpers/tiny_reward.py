"""A reward that does something else on given calls, as ``tiny_reward:reward``: to fail, to signal, to kill its process.

``actions`` maps the number of the call to a function of images and prompts whose result is returned. A subprocess takes
the call on which it kills itself as ``TINY_KILL_AT``, in which it hangs as ``TINY_HANG_AT``, fails as
``TINY_FAIL_AT``, and which takes three seconds as ``TINY_SLEEP_AT``. ``TINY_SHARDED_SIZE`` is the size from
which parameters are split: those of the tiny model are all too small.
"""

import os
import signal
import threading
import time

import numpy as np

from ddpo_jax import sharding

actions = {}
calls = 0


def scores(images, prompts):
    """Mean brightness, and the number of words as a part."""
    return images.astype(np.float32).mean((1, 2, 3)) / 255, {"words": np.array([len(p.split()) for p in prompts], "f4")}


def kill(images, prompts):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(images, prompts):
    """For ever, with a thread at its side that would keep any process which waits for its threads."""
    threading.Thread(target=time.sleep, args=(3600,)).start()
    time.sleep(3600)


def fail(images, prompts):
    raise OSError("no service")


def sleep(images, prompts):
    """Takes its time."""
    time.sleep(3)
    return scores(images, prompts)


ACTIONS = {"TINY_KILL_AT": kill, "TINY_HANG_AT": hang, "TINY_FAIL_AT": fail, "TINY_SLEEP_AT": sleep}
for variable, action in ACTIONS.items():
    if variable in os.environ:
        actions[int(os.environ[variable])] = action


if "TINY_SHARDED_SIZE" in os.environ:
    sharding._MIN_SHARDED_SIZE = int(os.environ["TINY_SHARDED_SIZE"])


def reward(images, prompts, metadata):
    """``scores``, or what an action says."""
    global calls
    calls += 1
    if calls - 1 in actions:
        return actions[calls - 1](images, prompts)
    return scores(images, prompts)


def patient(images, prompts, metadata):
    """``scores`` as of people or a server; how many images each call had goes to the file ``TINY_CALLS``."""
    with open(os.environ["TINY_CALLS"], "a") as file:
        file.write(f"{os.getpid()} {len(images)}\n")
    return scores(images, prompts)


patient.waits_for_others = True


def reset(**todo):
    """Starts counting anew; ``at_1=function`` acts on the second call."""
    global calls
    calls = 0
    actions.clear()
    actions.update({int(key.removeprefix("at_")): value for key, value in todo.items()})
