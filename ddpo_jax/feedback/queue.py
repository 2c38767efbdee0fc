"""What is still to be rated, and which page has it: one queue for all people who rate.

A batch of images becomes questions. One that was answered before, in this run or an earlier one, is not asked again.
Every open page gets another question; one that is not answered within ``lease_s`` is handed to the next page that asks.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float32, UInt8

from ddpo_jax.feedback import answers
from ddpo_jax.feedback.answers import STARS, Question
from ddpo_jax.serving.protocol import encode_image
from ddpo_jax.serving.server import Refusal

MODES = ("score", "pairs")
FIRST_NOTICE_S, MAX_NOTICE_S = 60.0, 3600.0  # the log says how far a batch is after this, twice this, ...
SEEN_S = 20.0  # a page that spoke within this time, or has a question, counts as a person at work


class Stopped(Exception):
    """The queue was closed before a batch was rated; the answers that were given are kept."""


@dataclass(frozen=True)
class Task:
    """A question as it is shown.

    Attributes:
      question: what is asked.
      shown: names of its images, from left to right.
    """

    question: Question
    shown: tuple[str, ...]


class Queue:
    """Questions about one batch at a time.

    Args:
      folder: of the answers and the images, made if need be.
      mode: "score" asks for 1 to 5 stars, "pairs" which of two images of a prompt is better.
      opponents: in "pairs", images of its prompt that each image is compared with at least; 0 = all.
      lease_s: seconds until an unanswered question is handed out again.
      clock: for tests.

    Raises:
      InputError: earlier answers cannot be read.
      OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        mode: str,
        opponents: int,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.mode = folder, mode
        self._opponents, self._lease_s, self._clock = opponents, lease_s, clock
        (folder / answers.IMAGES).mkdir(parents=True, exist_ok=True)
        self._answers = answers.read(folder)
        self._changed = threading.Condition()
        self._one_batch = threading.Lock()
        self._closed = False
        self._seen: dict[str, float] = {}  # pages, and when they last spoke
        self._open("", {})

    def _open(self, batch: str, tasks: dict[str, Task]) -> None:
        self._batch, self._tasks = batch, tasks
        self._leases: dict[str, tuple[str, float]] = {}  # id of the question -> page, end of its lease
        self._given: dict[str, tuple[str, str, Any]] = {}  # id -> page, rater, value of an answer to this batch

    def rate(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str], where: str
    ) -> Float32[np.ndarray, " N"]:
        """Waits until people have rated the images, and returns what they said.

        Args:
          images: shown to people.
          prompts: N of them.
          where: the address at which people can rate, for the log.

        Returns:
          Mean stars of each image, or the share of its comparisons with images of the same prompt in this batch that it
          won.

        Raises:
          ValueError: an image has no other of its prompt to be compared with.
          Stopped: ``close`` was called.
          OSError: an image cannot be saved.
        """
        names = [answers.image_name(image) for image in images]
        groups: dict[str, list[str]] = {}
        for name, prompt in zip(names, prompts, strict=True):
            groups.setdefault(prompt, []).append(name)
        plan = [question for prompt, group in groups.items() for question in self._questions(prompt, group)]
        tasks = {question.id: Task(question, _shown(question)) for question in plan}
        for name, image in zip(names, images, strict=True):
            self._save(name, image)
        with self._one_batch:
            with self._changed:
                self._open(hashlib.sha256("".join(sorted(tasks)).encode()).hexdigest()[:16], tasks)
                self._wait(where)
                values = {(q.prompt, *q.images): self._answers.value(q) or 0.0 for q in plan}
                self._open("", {})
        if self.mode == "score":
            scores = [values[prompt, name] for name, prompt in zip(names, prompts, strict=True)]
        else:
            wins = answers.win_shares((prompt, pair[0], pair[1], value) for (prompt, *pair), value in values.items())
            scores = [wins.get((name, prompt), 0.5) for name, prompt in zip(names, prompts, strict=True)]
        return np.array(scores, np.float32)

    def _questions(self, prompt: str, group: list[str]) -> list[Question]:
        if self.mode == "score":
            return [Question(prompt, (name,)) for name in dict.fromkeys(group)]
        distinct = sorted(set(group))  # by their pixels' hash: as good as random, and the same after a restart
        if len(group) < 2:
            raise ValueError(
                f"the prompt {prompt!r} has one image in this batch, and none to compare it with; "
                "prompts.samples_per_prompt must be at least 2 and divide sample.batch_size"
            )
        count = len(distinct)
        opponents = min(self._opponents or count, count - 1)
        # In a circle, each image meets those 1, 2, ... places further on, hence as many places back.
        steps = range(1, math.ceil(opponents / 2) + 1)
        pairs = {tuple(sorted((distinct[i], distinct[(i + step) % count]))) for step in steps for i in range(count)}
        return [Question(prompt, pair) for pair in sorted(pairs)]

    def _save(self, name: str, image: np.ndarray) -> None:
        path = self.folder / answers.IMAGES / f"{name}.png"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(encode_image(image))
            os.replace(temporary, path)

    def _wait(self, where: str) -> None:
        """Until every question of the batch has an answer; holds ``_changed``, which waiting releases."""
        start, notice = self._clock(), 0.0
        while (done := self._done()) < len(self._tasks):
            if self._closed:
                raise Stopped(f"stopped with {done} of {len(self._tasks)} answers given, which are kept")
            elapsed = self._clock() - start
            if elapsed >= notice:
                logging.info("waiting for people: %d of %d answers given; rate at %s", done, len(self._tasks), where)
                notice = max(notice + min(max(notice, FIRST_NOTICE_S), MAX_NOTICE_S), elapsed)
            self._changed.wait(max(notice - elapsed, 0.01))

    def _done(self) -> int:
        return sum(self._answers.value(task.question) is not None for task in self._tasks.values())

    def close(self) -> None:
        """Lets ``rate`` end at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- what a page asks for ----

    def next(self, page: str) -> dict[str, Any]:
        """The question for ``page``, which keeps the one it has, and how far the batch is, for the page to show."""
        with self._changed:
            now = self._clock()
            self._seen[page] = now
            self._seen = {key: seen for key, seen in self._seen.items() if now - seen < SEEN_S}
            task = self._lease(page, now)
            busy = {holder for holder, end in self._leases.values() if end > now}
            return {
                "mode": self.mode,
                "task": task,
                "done": self._done(),
                "total": len(self._tasks),
                "people": len(busy.union(self._seen)),
                "undo": self._last(page) is not None,
            }

    def _lease(self, page: str, now: float) -> dict[str, Any] | None:
        unanswered = [key for key, task in self._tasks.items() if self._answers.value(task.question) is None]
        mine = [key for key in unanswered if self._leases.get(key, ("", 0))[0] == page]
        free = [key for key in unanswered if self._leases.get(key, ("", -math.inf))[1] <= now]
        for key in (*mine, *free):
            self._leases[key] = (page, now + self._lease_s)
            task = self._tasks[key]
            return {"id": key, "prompt": task.question.prompt, "images": list(task.shown)}
        return None

    def answer(self, page: str, rater: str, key: str, value: Any) -> dict[str, Any]:
        """Keeps an answer and returns what ``next`` does.

        Args:
          page: that gives it.
          rater: the person's name.
          key: of the question.
          value: 1 to 5; or of a pair the name of the better image, or None if both are equally good.

        Raises:
          Refusal: the question is not asked any more, or the value is none.
          OSError: the answer cannot be saved; it is still asked.
        """
        with self._changed:
            task = self._tasks.get(key)
            if task is None:
                raise Refusal(409, "these images are no longer asked about")
            if self._answers.value(task.question) is None:
                record = self._record(task, rater, value)
                answers.append(self.folder, record)
                self._answers.add(record)
                self._given[key] = (page, rater, value)
                self._leases.pop(key, None)
                self._changed.notify_all()
            elif self._given.get(key, (None,))[0] != page:  # of this page: its answer was lost on the way back
                raise Refusal(409, "someone else has rated this meanwhile")
        return self.next(page)

    def _record(self, task: Task, rater: str, value: Any) -> dict[str, Any]:
        common = {"rater": rater, "batch": self._batch, "prompt": task.question.prompt}
        if self.mode == "score":
            if type(value) is not int or value not in STARS:
                raise Refusal(400, f"the value is {value!r}; it must be 1 to 5")
            return {"kind": "score", **common, "image": task.shown[0], "score": value}
        if value not in (None, *task.shown):
            raise Refusal(400, f"the value is {value!r}; it must be the name of one of the images, or null")
        return {"kind": "pair", **common, "images": list(task.shown), "better": value}

    def undo(self, page: str) -> dict[str, Any]:
        """Takes the last answer of ``page`` to this batch back, and returns what ``next`` does: its question again.

        Raises:
          Refusal: there is none.
          OSError: that cannot be saved.
        """
        with self._changed:
            key = self._last(page)
            if key is None:
                raise Refusal(409, "there is no answer of yours to take back")
            task, rater = self._tasks[key], self._given[key][1]
            common = {"rater": rater, "batch": self._batch, "prompt": task.question.prompt}
            record = {"kind": "undo", **common, "images": list(task.shown)}
            answers.append(self.folder, record)
            self._answers.add(record)
            del self._given[key]
            for other, (holder, _) in list(self._leases.items()):
                if holder == page:
                    del self._leases[other]
            self._leases[key] = (page, self._clock() + self._lease_s)
            self._changed.notify_all()
        return self.next(page)

    def _last(self, page: str) -> str | None:
        return next((key for key in reversed(self._given) if self._given[key][0] == page), None)


def _shown(question: Question) -> tuple[str, ...]:
    """The question's images, in an order that favours none: the side of an image follows from the question's id."""
    return question.images if int(question.id, 16) % 2 else question.images[::-1]
