"""Prompts of a tensorflow-datasets data set in array_record files, for sets of any size (100 000 and more).

Needs the extra ``data`` (``pip install ddpo_jax[data]``), but no TensorFlow. Only the records that are drawn are read,
by their index, and images in them are not decoded. Which ones follows from the generator of the epoch alone, so there
is no position to save: a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.prompts import PromptFn, _text, draw


def default_config() -> ConfigDict:
    """Options of this source."""
    return ConfigDict(
        {
            "path": "",  # folder of a prepared version that has dataset_info.json, such as DATA/my_set/1.0.0
            "split": "train",  # split, or part of one: train, validation, train[:10%]
            "feature": "prompt",  # the text feature that is the prompt
            "metadata": "",  # features that travel to the reward, with commas: objects,count
        }
    )


def open_split(path: str, split: str, features: Sequence[str]) -> Sequence[Any]:
    """The records of a split, read one by one when they are asked for.

    Args:
      path: folder of a prepared version.
      split: name of a split, or a slice of one.
      features: names that must be there.

    Raises:
      InputError: tensorflow-datasets is not installed, or there is no such data set, split or feature.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"prompts.name: received 'tfds'; tensorflow-datasets cannot be imported ({error}); "
            "pip install 'ddpo_jax[data]'"
        ) from error
    start = _text.refusal(path)
    folder = pathlib.Path(path).expanduser()
    if not path or not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"{start}it has no dataset_info.json; give the folder of a prepared version: DATA/NAME/VERSION"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        known = builder.info.features
        decoders = {name: tfds.decode.SkipDecoding() for name in known if isinstance(known[name], tfds.features.Image)}
        missing = [name for name in features if name not in known]
        if not missing:
            return builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:  # another file format, no such split, broken files: the package has many errors
        cause = " ".join(str(error).split())[:300]
        raise InputError(
            f"{start}split {split!r} cannot be read ({type(error).__name__}: {cause}); "
            "give a data set in array_record format and one of its splits"
        ) from error
    raise InputError(
        f"{start}it has no feature {missing[0]!r}; its features are {', '.join(sorted(known))}; name one of them"
    )


def make(config: ConfigDict) -> PromptFn:
    """Draws records; metadata is ``record``, the index in the split, and the features that were asked for.

    Raises:
      InputError: as ``open_split``; when called, a record whose prompt cannot be one.
    """
    feature, carried = config.feature, [name.strip() for name in config.metadata.split(",") if name.strip()]
    records = open_split(config.path, config.split, [feature, *carried])

    def read(index: int) -> tuple[str, dict[str, Any]]:
        record = records[index]
        prompt = _plain(record[feature])
        wrong = _text.fault(prompt) if isinstance(prompt, str) else f"is a {type(prompt).__name__}, not text"
        if wrong is not None:
            raise InputError(f"prompts.feature: received {feature!r}; record {index} {wrong}")
        return prompt.strip(), {"record": index} | {name: _plain(record[name]) for name in carried}

    def source(rng: np.random.Generator, n: int) -> tuple[list[str], list[dict[str, Any]]]:
        found = [read(int(index)) for index in draw(rng, len(records), n)]
        return [prompt for prompt, _ in found], [metadata for _, metadata in found]

    return source


def _plain(value: Any) -> Any:
    """Bytes as text, and arrays and sequences as lists, so that metadata is what JSON can hold."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")  # what is not UTF-8 is then refused as half a character
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
