"""BERT's uncased WordPiece tokenizer with BLIP's two further tokens, by the `tokenizers` package alone.

Control characters are dropped, CJK characters set apart, accents and case removed; words and punctuation marks are cut
into the longest pieces of the vocabulary, from left to right (Wu et al. 2016, arXiv:1609.08144). A row is [CLS], the
pieces, [SEP], then [PAD].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError, one_line
from ddpo_jax.models import schema
from ddpo_jax.models.tokenizer import checked_vocabulary

DECODE, ENCODE = "[DEC]", "[ENC]"  # begins an answer; replaces [CLS] of a question
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece:
    """Texts to rows of token ids of one length.

    Attributes:
      max_length: L of a row, [CLS] and [SEP] included; longer texts are cut so that [SEP] stays.
      decode_id, encode_id: of [DEC] and [ENC], which follow the vocabulary: 30522 and 30523 with BERT's.
      vocab_size: number of ids, [DEC] and [ENC] included.
    """

    def __init__(self, vocab: Mapping[str, int], *, max_length: int):
        """Builds the tokenizer.

        Args:
          vocab: token -> id; pieces that continue a word begin with ``##``.
          max_length: length of every row, at least 2.

        Raises:
          InputError: the vocabulary lacks a special token.
        """
        absent = [token for token in _SPECIAL if token not in vocab]
        if absent:
            raise InputError(f"the vocabulary has no {', '.join(absent)}; it must be that of bert-base-uncased")
        self.max_length = max_length
        self._core = core = tokenizers.Tokenizer(models.WordPiece(dict(vocab), unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.add_special_tokens([*_SPECIAL, DECODE, ENCODE])
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
        )
        core.enable_truncation(max_length)
        core.enable_padding(length=max_length, pad_id=vocab["[PAD]"], pad_token="[PAD]")
        self.decode_id, self.encode_id = self.id(DECODE), self.id(ENCODE)
        self.vocab_size = core.get_vocab_size()

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], *, max_length: int) -> WordPiece:
        """Reads `vocab.txt`, or else `tokenizer.json`.

        Raises:
          InputError: there is neither, or it does not hold a WordPiece vocabulary.
        """
        folder = Path(path)
        plain, whole = folder / "vocab.txt", folder / "tokenizer.json"
        if os.path.lexists(plain):
            file, vocab = plain, _lines(plain)
        elif os.path.lexists(whole):
            file, vocab = whole, _model(whole)
        else:
            raise InputError(f"{folder}: received no vocab.txt; put that of google-bert/bert-base-uncased there")
        try:
            return cls(vocab, max_length=max_length)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    def id(self, token: str) -> int:
        """The id of a token.

        Raises:
          InputError: it is not in the vocabulary.
        """
        found = self._core.token_to_id(token)
        if found is None:
            raise InputError(f"the vocabulary has no {token!r}; it must be that of bert-base-uncased")
        return found

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
        """N texts -> ids, and a mask that is false where they are padding."""
        rows = self._core.encode_batch(list(texts))
        ids = np.asarray([row.ids for row in rows], np.int32).reshape(len(rows), self.max_length)
        mask = np.asarray([row.attention_mask for row in rows], bool).reshape(len(rows), self.max_length)
        return ids, mask


def _lines(file: Path) -> dict[str, int]:
    try:
        tokens = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8 text; download the file again") from error
    except OSError as error:
        raise InputError(f"{file}: it cannot be read: {one_line(error)}; download the file again") from error
    return checked_vocabulary(file, {token: index for index, token in enumerate(tokens)})


def _model(file: Path) -> dict[str, int]:
    whole = read_json(file)
    model = whole["model"] if "model" in whole else None
    kind, vocab = (model[key] if isinstance(model, dict) and key in model else None for key in ("type", "vocab"))
    if kind != "WordPiece":
        what = schema.shown(kind)
        raise InputError(f"{file} model: received the type {what}; it must be the WordPiece of bert-base-uncased")
    return checked_vocabulary(file, vocab)
