"""Learns the miniature's vocabulary: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909), laid out as CLIP's."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable

from tokenizers import pre_tokenizers

from ddpo_jax.errors import InputError
from ddpo_jax.models.tokenizer import END, END_OF_WORD, START, Tokenizer, word_splitter


def train_bpe(texts: Iterable[str], vocab_size: int, out_folder: str | os.PathLike[str], max_length: int) -> Tokenizer:
    """Learns a small CLIP-style vocabulary and writes its tokenizer folder; the same texts give the same bytes.

    The ids are laid out as CLIP's: 256 bytes, the same 256 at the end of a word, merges, start, end. Learning is done
    here and not by `tokenizers.trainers`, whose tie-breaking follows the order of a randomly seeded hash map.

    Args:
      texts: the captions to learn from.
      vocab_size: at most this many ids (fewer when every word has become one token); at least 514.
      out_folder: created if missing.
      max_length: row length, start and end tokens included.

    Raises:
      InputError: `vocab_size` < 514.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + END_OF_WORD for letter in alphabet]
    if vocab_size < len(base) + 2:
        raise InputError(
            f"vocab_size: received {vocab_size}; it must be at least {len(base) + 2}, for all bytes, start and end"
        )
    split = word_splitter()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(split(text))
    words = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in sorted(counts)}
    merges: list[tuple[str, str]] = []
    while len(base) + len(merges) + 2 < vocab_size:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _apply(parts, best) for word, parts in words.items()}
    # Two different pairs may spell the same token; it has one id.
    tokens = dict.fromkeys([*base, *(left + right for left, right in merges), START, END])
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, merges, max_length=max_length)
    tokenizer.save(out_folder)
    return tokenizer


def _apply(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Merges the pair wherever it occurs, from left to right."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
