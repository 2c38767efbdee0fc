"""CLIP's byte-level BPE tokenizer, read from and written to the tokenizer folder of a Stable Diffusion checkpoint.

Only the `tokenizers` package is used. Text is NFC-normalised, white space collapsed, lower-cased, split into words,
and every word encoded as bytes that BPE merges (Sennrich et al. 2016, arXiv:1508.07909); a word ends in ``</w>``.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ddpo_jax.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# Words: contractions, runs of letters, single digits, runs of anything else (the pattern published with CLIP).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("unk_token", "bos_token", "eos_token", "pad_token")
_LONGEST = 100_000  # transformers writes 1e30 for "no limit", which cannot be padded to


class Tokenizer:
    """Prompts to rows of token ids of one length.

    Attributes:
      max_length: L, start and end tokens included; longer prompts are cut so that the end token stays.
      bos_token_id, eos_token_id, pad_token_id: as the folder says.
      vocab_size: number of ids, added tokens included.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        max_length: int,
        special: Mapping[str, str] | None = None,
        added: Sequence[tokenizers.AddedToken] = (),
        config: Mapping[str, Any] | None = None,
    ):
        """Builds the tokenizer.

        Args:
          vocab: token -> id.
          merges: pairs in the order in which they were learned.
          max_length: length of every row.
          special: the texts of unk_token, bos_token, eos_token and pad_token, where they differ from CLIP's.
          added: further tokens that are matched before BPE.
          config: the folder's tokenizer_config.json, written back by `save`.

        Raises:
          InputError: a special token is not in the vocabulary, or `max_length` cannot hold start and end.
        """
        if not 2 <= max_length <= _LONGEST:
            raise InputError(
                f"tokenizer: model_max_length = {max_length} must be in [2, {_LONGEST}]; Stable Diffusion's is 77"
            )
        self.special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END, **(special or {})}
        self.max_length = max_length
        self.merges = [(left, right) for left, right in merges]
        self._vocab = dict(vocab)
        self._config = dict(config or {})
        self._core = _core(self._vocab, self.merges, self.special["unk_token"])
        known = {token.content for token in added}
        for key, name in self.special.items():
            if name not in self._vocab and name not in known:
                raise InputError(f"tokenizer: {key} = {name!r} is not in the vocabulary")
        names = dict.fromkeys(self.special[key] for key in _SPECIAL)
        self._core.add_special_tokens([name for name in names if name not in known])
        for token in added:
            (self._core.add_special_tokens if token.special else self._core.add_tokens)([token])
        ids = self._core.get_vocab(with_added_tokens=True)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            ids[self.special[key]] for key in ("bos_token", "eos_token", "pad_token")
        )
        self.vocab_size = len(ids)
        self._core.post_processor = processors.RobertaProcessing(
            (self.special["eos_token"], self.eos_token_id),
            (self.special["bos_token"], self.bos_token_id),
            trim_offsets=False,
            add_prefix_space=False,
        )
        self._portable = self._core.to_str(pretty=True)  # tokenizer.json holds no length: tokenizer_config.json does
        self._core.enable_truncation(max_length)
        self._core.enable_padding(length=max_length, pad_id=self.pad_token_id, pad_token=self.special["pad_token"])

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads `vocab.json` + `merges.txt`, or else `tokenizer.json`, and the special tokens and length beside them.

        Raises:
          InputError: files are missing, or the tokenizer is not a CLIP BPE.
        """
        folder = Path(path)
        config = _json(folder / "tokenizer_config.json")
        whole = _json(folder / "tokenizer.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = _json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]
        elif whole:
            model = whole["model"]
            if model["type"] != "BPE" or model["end_of_word_suffix"] != END_OF_WORD:
                raise InputError(f"{folder / 'tokenizer.json'}: only a CLIP byte-level BPE tokenizer is supported")
            vocab = model["vocab"]
            merges = [_pair(pair) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        else:
            raise InputError(f"{folder}: no tokenizer here; expected tokenizer.json, or vocab.json and merges.txt")
        special = {key: _text(config[key]) for key in _SPECIAL if key in config and config[key] is not None}
        if "added_tokens_decoder" not in config:  # the older layout, in which this file has the last word
            overrides = _json(folder / "special_tokens_map.json")
            special |= {key: _text(overrides[key]) for key in _SPECIAL if key in overrides}
        return cls(
            vocab,
            merges,
            max_length=int(config["model_max_length"]) if "model_max_length" in config else 77,
            special=special,
            added=_added(config, whole, _json(folder / "added_tokens.json")),
            config=config,
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> i32[N, max_length]."""
        rows = [encoding.ids for encoding in self._core.encode_batch(list(texts))]
        return np.asarray(rows, np.int32).reshape(len(rows), self.max_length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes both layouts, `vocab.json` + `merges.txt` and `tokenizer.json`, and their configs."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **self._config,
            **self.special,
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        files = {
            "vocab.json": json.dumps(self._vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in self.merges),
            "tokenizer.json": self._portable,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "special_tokens_map.json": json.dumps(self.special, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="\n")


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
        raise InputError(f"vocab_size = {vocab_size} must be at least {len(base) + 2}: all bytes, and start and end")
    reader = _core({token: i for i, token in enumerate([*base, END])}, [], END)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(w for w, _ in reader.pre_tokenizer.pre_tokenize_str(reader.normalizer.normalize_str(text)))
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


def _core(vocab: dict[str, int], merges: Sequence[tuple[str, str]], unk_token: str) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab=vocab,
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        fuse_unk=False,
        unk_token=unk_token,
    )
    core = tokenizers.Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _apply(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Merges the pair wherever it occurs, from left to right."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added(
    config: Mapping[str, Any], whole: Mapping[str, Any], legacy: Mapping[str, int]
) -> list[tokenizers.AddedToken]:
    """Added tokens in the order of their ids, from whichever of the three places the folder keeps them in."""
    entries: dict[int, dict[str, Any]] = {}
    if "added_tokens_decoder" in config:
        entries = {int(index): dict(token) for index, token in config["added_tokens_decoder"].items()}
    else:
        entries = {index: {"content": token, "normalized": True} for token, index in legacy.items()}
        if "added_tokens" in whole:
            entries |= {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]}
    return [
        tokenizers.AddedToken(**{key: value for key, value in entries[index].items() if key != "__type"})
        for index in sorted(entries)
    ]
