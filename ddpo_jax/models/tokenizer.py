"""CLIP's byte-level BPE tokenizer, read from and written to the tokenizer folder of a Stable Diffusion checkpoint.

Only the `tokenizers` package is used. Text is NFC-normalised, white space collapsed, lower-cased, split into words,
and every word encoded as bytes that BPE merges (Sennrich et al. 2016, arXiv:1508.07909); a word ends in ``</w>``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError, one_line
from ddpo_jax.models import schema

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# Words: contractions, runs of letters, single digits, runs of anything else (the pattern published with CLIP).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MODEL = {"type": "BPE", "end_of_word_suffix": END_OF_WORD}  # of a tokenizer.json
_SPECIAL = ("unk_token", "bos_token", "eos_token", "pad_token")
_ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), schema.BOOL)


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
        schema.check("", {"model_max_length": max_length}, schema.TOKENIZER, "use Stable Diffusion's 77")
        self.special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END, **(special or {})}
        self.max_length = max_length
        self.merges = [(left, right) for left, right in merges]
        self._vocab = dict(vocab)
        self._config = dict(config or {})
        known = {token.content for token in added}
        unknown = [key for key, name in self.special.items() if name not in self._vocab and name not in known]
        rule = f"it must be in the vocabulary; {schema.FIX}"
        schema.refuse("", (f"{key}: received {schema.shown(self.special[key])}; {rule}" for key in unknown))
        self._core = _core(self._vocab, self.merges, self.special["unk_token"])
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
        config, whole = _optional(folder / "tokenizer_config.json"), _optional(folder / "tokenizer.json")
        schema.check(str(folder / "tokenizer_config.json"), config, schema.TOKENIZER)
        if os.path.lexists(folder / "vocab.json") and os.path.lexists(folder / "merges.txt"):
            vocab = checked_vocabulary(folder / "vocab.json", read_json(folder / "vocab.json"))
            merges = checked_merges(folder / "merges.txt", read_merges(folder / "merges.txt"), vocab)
        elif whole:
            vocab, merges = whole_vocabulary(
                folder / "tokenizer.json", whole, _MODEL, "a CLIP byte-level BPE tokenizer"
            )
        else:
            raise InputError(f"{folder}: no tokenizer here; expected tokenizer.json, or vocab.json and merges.txt")
        special = {key: _text(config[key]) for key in _SPECIAL if key in config and config[key] is not None}
        if "added_tokens_decoder" not in config:  # the older layout, in which this file has the last word
            overrides = _optional(folder / "special_tokens_map.json")
            schema.check(str(folder / "special_tokens_map.json"), overrides, schema.TOKENIZER)
            special |= {key: _text(overrides[key]) for key in _SPECIAL if key in overrides and overrides[key]}
        added = _added(folder, config, whole)
        length = config["model_max_length"] if "model_max_length" in config else 77
        try:
            return cls(vocab, merges, max_length=length, special=special, added=added, config=config)
        except InputError as error:  # of special tokens, which do not say where they are from
            schema.refuse(str(folder), str(error).splitlines())
            raise

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


def word_splitter() -> Callable[[str], list[str]]:
    """A function from a text to the words that BPE then merges the letters of; a letter stands for a byte."""
    core = _core({END: 0}, [], END)

    def split(text: str) -> list[str]:
        return [word for word, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(text))]

    return split


# --- reading a folder: the library panics on a vocabulary that contradicts itself, so all of it is checked first ------


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def read_merges(path: Path) -> list[Any]:
    """The merges of a merges.txt, one a line, not checked yet."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: it cannot be read as text: {one_line(error)}; {schema.FIX}") from error
    return [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]


def checked_vocabulary(path: Path, vocab: Any, highest: int | None = None) -> dict[str, int]:
    """``vocab``, if it gives every token a number of its own: 0, 1, 2, ..., or with gaps up to ``highest``.

    Raises:
      InputError: it does not; ``path`` is where it was read.
    """
    numbers = "the numbers 0, 1, 2, ..., each once" if highest is None else "different whole numbers"
    rule = f"it must be an object of texts and {numbers}"
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"{path} vocabulary: received {schema.shown(vocab)}; {rule}; {schema.FIX}")
    top = len(vocab) - 1 if highest is None else highest
    seen: set[int] = set()
    for token, number in vocab.items():
        if not schema.is_whole(number, 0, top) or number in seen or not _is_text(token):
            where = f"{path} {schema.shown(token)}"
            raise InputError(f"{where}: received {schema.shown(number)}; {rule}; {schema.FIX}")
        seen.add(number)
    return vocab


def checked_merges(path: Path, merges: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """``merges``, if each joins two tokens of the vocabulary to a third.

    Raises:
      InputError: one does not; ``path`` is where they were read.
    """
    rule = "each merge must be two tokens of the vocabulary that make a third"
    if not isinstance(merges, list):
        raise InputError(f"{path} merges: received {schema.shown(merges)}; {rule}; {schema.FIX}")
    for number, pair in enumerate(merges):
        texts = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not texts or not {*pair, "".join(pair)} <= vocab.keys():
            where = f"{path} merge {number + 1}"
            raise InputError(f"{where}: received {schema.shown(pair)}; {rule}; {schema.FIX}")
    return merges


def whole_vocabulary(
    path: Path, whole: Mapping[str, Any], wanted: Mapping[str, Any], kind: str, highest: int | None = None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer.json, which holds a merge as a text or as a pair.

    Args:
      path: where it was read.
      whole: its content.
      wanted: what its model must say of itself.
      kind: of tokenizer, for the message.
      highest: see ``checked_vocabulary``.

    Raises:
      InputError: it is another kind of tokenizer, or contradicts itself.
    """
    model = whole["model"] if "model" in whole else None
    if not isinstance(model, dict) or any(key not in model or model[key] != value for key, value in wanted.items()):
        raise InputError(f"{path}: only {kind} is supported; give the folder of such a one")
    vocab, merges = (model[key] if key in model else None for key in ("vocab", "merges"))
    if isinstance(merges, list):
        merges = [tuple(x.split(" ")) if isinstance(x, str) else tuple(x) if isinstance(x, list) else x for x in merges]
    checked = checked_vocabulary(path, vocab, highest)
    return checked, checked_merges(path, merges, checked)


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold: JSON can spell half of a surrogate pair."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode("utf-8") == value


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added(folder: Path, config: Mapping[str, Any], whole: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """Added tokens in the order of their ids, from whichever of the three places the folder keeps them in."""
    found: list[tuple[str, Any, Any]] = []  # (where, id, token)
    if "added_tokens_decoder" in config:
        where, table = f"{folder / 'tokenizer_config.json'} added_tokens_decoder", config["added_tokens_decoder"]
        if not isinstance(table, dict):
            rule = "it must be an object of numbers and tokens"
            raise InputError(f"{where}: received {schema.shown(table)}; {rule}; {schema.FIX}")
        found = [(where, int(i) if i.isdecimal() and len(i) < 10 else i, token) for i, token in table.items()]
    else:
        where = str(folder / "added_tokens.json")
        legacy = _optional(folder / "added_tokens.json")
        found = [(where, i, {"content": token, "normalized": True}) for token, i in legacy.items()]
        where = f"{folder / 'tokenizer.json'} added_tokens"
        listed = whole["added_tokens"] if "added_tokens" in whole else []
        for token in listed if isinstance(listed, list) else [listed]:
            found.append((where, token["id"] if isinstance(token, dict) and "id" in token else None, token))
    entries = {}
    for where, index, token in found:
        has_content = isinstance(token, dict) and "content" in token and schema.TEXT.holds(token["content"])
        if not (has_content and _is_text(token["content"]) and schema.is_whole(index, 0, schema.MAX_TOKENS)):
            rule = "it must be an object with a number and a text as content"
            received = f"received {schema.shown(token)} as number {schema.shown(index)}"
            raise InputError(f"{where}: {received}; {rule}; {schema.FIX}")
        schema.check(f"{where} {index}", token, _ADDED)
        entries[index] = token
    return [
        tokenizers.AddedToken(token["content"], **{key: token[key] for key in _ADDED if key in token})
        for _, token in sorted(entries.items())
    ]
