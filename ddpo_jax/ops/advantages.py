"""Advantage estimators: rewards f64[N] and prompt ids i64[N] to advantages f64[N]. Host side, numpy.

Standard deviations are population ones (ddof 0), and ``eps`` is added to them, as the public DDPO code does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ddpo_jax.errors import InputError

Rewards = np.ndarray  # f64[N]
PromptIds = np.ndarray  # i64[N]


def zscore(rewards: Rewards, eps: float = 1e-6) -> np.ndarray:
    """``(r - mean) / (std + eps)`` over the whole batch."""
    rewards = np.asarray(rewards, np.float64)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def group_statistics(rewards: Rewards, prompt_ids: PromptIds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and number of samples of each sample's own prompt: three arrays [N]."""
    rewards = np.asarray(rewards, np.float64)
    _, index = np.unique(np.asarray(prompt_ids), return_inverse=True)
    count = np.bincount(index)
    mean = np.bincount(index, rewards) / count
    std = np.sqrt(np.bincount(index, np.square(rewards - mean[index])) / count)
    return mean[index], std[index], count[index]


def require_groups(prompt_ids: PromptIds, algorithm: str) -> None:
    """Raise InputError if a prompt has a single sample, which leaves a group baseline or a pair undefined."""
    ids, count = np.unique(np.asarray(prompt_ids), return_counts=True)
    if count.size and count.min() < 2:
        raise InputError(
            f"prompts.samples_per_prompt: received 1 sample of prompt id {ids[count.argmin()]}; {algorithm} compares "
            "samples of the same prompt, which takes at least 2; use 4"
        )


def group_mean_baseline(rewards: Rewards, prompt_ids: PromptIds) -> np.ndarray:
    """``r - mean`` over the samples of the same prompt in this batch."""
    return np.asarray(rewards, np.float64) - group_statistics(rewards, prompt_ids)[0]


def group_zscore(rewards: Rewards, prompt_ids: PromptIds, eps: float = 1e-6) -> np.ndarray:
    """``(r - mean) / (std + eps)`` over the samples of the same prompt in this batch (GRPO, Shao et al. 2024)."""
    mean, std, _ = group_statistics(rewards, prompt_ids)
    return (np.asarray(rewards, np.float64) - mean) / (std + eps)


def decoupled(scores: Mapping[str, Rewards], weights: Mapping[str, float], prompt_ids: PromptIds) -> np.ndarray:
    """Sum over several rewards of weight times ``group_zscore`` [N]: none drowns another by its scale.

    An advantage that is a rising straight line of the reward within a prompt has the same z-score there, so this is the
    sum of standardised advantages for every algorithm that compares the samples of a prompt.

    Args:
      scores: f64[N] by the reward's name.
      weights: factors by the same names.
      prompt_ids: i64[N].

    Source: Liu et al. 2026, arXiv:2601.05242 (GDPO), without its last step, ``zscore`` over the batch.
    """
    return np.sum([weight * group_zscore(scores[name], prompt_ids) for name, weight in weights.items()], axis=0)


def deviation(rewards: Rewards, prompt_ids: PromptIds | None = None) -> float:
    """Standard deviation of the rewards, or with prompt ids that of what is left of them after their prompt's mean."""
    rewards = np.asarray(rewards, np.float64)
    mean = rewards.mean() if prompt_ids is None else group_statistics(rewards, prompt_ids)[0]
    return float(np.sqrt(np.square(rewards - mean).mean()))


def leave_one_out(rewards: Rewards, prompt_ids: PromptIds) -> np.ndarray:
    """``r_i - mean_{j != i} r_j`` over the K samples of a prompt, which equals ``(r_i - mean) K / (K - 1)``.

    Source: Gupta et al. 2025, Eq. 14.
    """
    require_groups(prompt_ids, "a leave-one-out baseline")
    mean, _, count = group_statistics(rewards, prompt_ids)
    return (np.asarray(rewards, np.float64) - mean) * count / (count - 1)


def softmax_weights(logits: np.ndarray, prompt_ids: PromptIds | None = None) -> np.ndarray:
    """Softmax over the batch, or over each prompt's samples, times the number of them: the mean weight is 1."""
    logits = np.asarray(logits, np.float64)
    ids = np.zeros(logits.shape, np.int64) if prompt_ids is None else np.asarray(prompt_ids)
    _, index = np.unique(ids, return_inverse=True)
    top = np.full(index.max(initial=-1) + 1, -np.inf)
    np.maximum.at(top, index, logits)  # so that the largest exponent is 0: no overflow
    weights = np.exp(logits - top[index])
    return weights * (np.bincount(index) / np.bincount(index, weights))[index]


class PromptStats:
    """Recent rewards of every prompt, each prompt in a ring buffer of its own (Black et al. 2023, appendix D.1).

    B2-DiffuRL (Hu et al. 2025) limits the buffer by the number of updates in place of its length. The buffers are part
    of the training state: ``state_dict`` is flat arrays and a counter, made for a checkpoint.
    """

    def __init__(self) -> None:
        self._rewards: dict[int, list[float]] = {}  # oldest first
        self._stamps: dict[int, list[int]] = {}  # number of the update that brought each reward
        self._updates = 0

    def update(
        self, rewards: Rewards, prompt_ids: PromptIds, *, buffer_size: int | None = None, history: int | None = None
    ) -> None:
        """Append rewards f64[N] to the buffers of their prompts, then drop what is too old.

        Args:
          rewards: finite rewards, in the order they were drawn.
          prompt_ids: i64[N]; a prompt keeps its id for the whole run.
          buffer_size: rewards kept for each prompt; None keeps all.
          history: updates whose rewards are kept, this one included; None keeps all.
        """
        rewards = np.asarray(rewards, np.float64)
        if not np.all(np.isfinite(rewards)):
            raise InputError(f"{int((~np.isfinite(rewards)).sum())} of {rewards.size} rewards are not finite")
        self._updates += 1
        for prompt, reward in zip(np.asarray(prompt_ids).tolist(), rewards.tolist(), strict=True):
            self._rewards.setdefault(prompt, []).append(reward)
            self._stamps.setdefault(prompt, []).append(self._updates)
        for prompt in set(np.asarray(prompt_ids).tolist()):
            stamps = self._stamps[prompt]
            expired = 0 if history is None else int(np.searchsorted(stamps, self._updates - history, side="right"))
            overfull = 0 if buffer_size is None else max(0, len(stamps) - buffer_size)
            drop = max(expired, overfull)
            del stamps[:drop], self._rewards[prompt][:drop]

    def statistics(
        self, rewards: Rewards, prompt_ids: PromptIds, min_count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard deviation and buffer length of each sample's prompt, three arrays [N].

        A prompt with fewer than ``min_count`` rewards in its buffer gets those of the whole batch ``rewards``.
        """
        rewards = np.asarray(rewards, np.float64)
        found: dict[int, tuple[float, float, int]] = {}
        for prompt in set(np.asarray(prompt_ids).tolist()):
            kept = np.asarray(self._rewards.get(prompt, []), np.float64)
            source = rewards if kept.size < max(1, min_count) else kept
            found[prompt] = (float(source.mean()), float(source.std()), kept.size)
        table = np.array([found[prompt] for prompt in np.asarray(prompt_ids).tolist()], np.float64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2].astype(np.int64)

    def zscore(self, rewards: Rewards, prompt_ids: PromptIds, *, min_count: int, eps: float = 1e-6) -> np.ndarray:
        """``(r - mean) / (std + eps)`` with the statistics of the prompt's buffer. Call ``update`` first."""
        mean, std, _ = self.statistics(rewards, prompt_ids, min_count)
        return (np.asarray(rewards, np.float64) - mean) / (std + eps)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What is needed to continue: prompt_ids i64[M], counts i64[M], rewards f64[R], stamps i64[R], updates i64."""
        ids = sorted(self._rewards)
        return {
            "prompt_ids": np.array(ids, np.int64),
            "counts": np.array([len(self._rewards[i]) for i in ids], np.int64),
            "rewards": np.array([r for i in ids for r in self._rewards[i]], np.float64),
            "stamps": np.array([s for i in ids for s in self._stamps[i]], np.int64),
            "updates": np.array(self._updates, np.int64),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content by what ``state_dict`` returned."""
        ends = np.cumsum(np.asarray(state["counts"]))[:-1]
        ids = np.asarray(state["prompt_ids"]).tolist()
        # strict=False: an empty state splits into one empty part
        self._rewards, self._stamps = (
            {i: part.tolist() for i, part in zip(ids, np.split(np.asarray(state[key]), ends), strict=False)}
            for key in ("rewards", "stamps")
        )
        self._updates = int(state["updates"])
