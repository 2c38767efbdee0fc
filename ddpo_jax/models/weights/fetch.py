"""Finds a published file: in the user's folders, in the hub's cache, or by downloading it; verified before its use."""

from __future__ import annotations

import os
from pathlib import Path

from absl import logging

from ddpo_jax.config.model import hub_fault
from ddpo_jax.errors import InputError
from ddpo_jax.models.weights.catalogue import Entry, cache_folder, entries, entry, is_verified, verify
from ddpo_jax.models.weights.convert import as_safetensors

VARIABLE = "DDPO_WEIGHTS"


def find_weights(name: str, weights_dir: str = "") -> Path:
    """The file of a catalogue's entry: found, or downloaded with a progress bar, then verified.

    Args:
      name: of the entry, such as "hps_v2_1".
      weights_dir: a folder to look in first, as ``OWNER/REPOSITORY/FILE`` or, where that is unambiguous, as ``FILE``;
        then ``$DDPO_WEIGHTS``, ``~/.cache/ddpo_jax/weights`` and the hub's cache are searched.

    Returns:
      A safetensors file, into which a pickle is converted once; or a text file.

    Raises:
      InputError: it is nowhere and cannot be downloaded, or it is not the published file.
    """
    wanted = entry(name)
    path = located(wanted, weights_dir)
    if path is None:
        path = download(wanted, places=folders(weights_dir))
    if wanted.pinned and not is_verified(path, name):
        logging.info("verifying %s", path)
    verify(path, name)
    return as_safetensors(path) if wanted.format == "torch-zip" else path


def folders(weights_dir: str = "") -> list[Path]:
    """The folders that are searched, the first one first.

    Raises:
      InputError: one that the user named is not there.
    """
    named = {"weights_dir": weights_dir, VARIABLE: os.environ[VARIABLE] if VARIABLE in os.environ else ""}
    found = []
    for key, text in named.items():
        if text:
            try:
                folder = Path(text).expanduser()
                there = folder.is_dir()
            except (OSError, RuntimeError, ValueError):  # a name too long, ~nouser, a null byte
                there = False
            if not there:
                raise InputError(
                    f"{key}: received {text[:200]!r}; it must be a folder that you can read; make it first"
                )
            found.append(folder)
    return [*found, cache_folder() / "weights"]


def located(wanted: Entry, weights_dir: str = "") -> Path | None:
    """Where the file is on this machine, or None."""
    base = Path(wanted.file).name
    unique = sum(Path(other.file).name == base for other in entries().values()) == 1
    for folder in folders(weights_dir):
        for path in [folder / wanted.repo / wanted.file, *([folder / base] if unique else [])]:
            if os.path.isfile(path):
                return path
    if wanted.host != "hub":
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(wanted.repo, wanted.file, revision=wanted.revision or None)
    return Path(cached) if isinstance(cached, str) else None


def download(wanted: Entry, into: Path | None = None, places: list[Path] | None = None) -> Path:
    """Downloads a file, resuming what an earlier attempt began.

    Args:
      wanted: what.
      into: a folder, below which it is written as ``OWNER/REPOSITORY/FILE``; None takes the hub's cache.
      places: that have been searched, for the message.

    Raises:
      InputError: it cannot be downloaded; the message says where to get it and where to put it.
    """
    what = f"weights {wanted.name}"
    put = f"put it at {(into or (places or folders())[0]) / wanted.repo / wanted.file}"
    at = f" at revision {wanted.revision}" if wanted.revision else ""
    if wanted.host != "hub":
        raise InputError(
            f"{what}: {wanted.file} is not there, and no model hub has it; get it from the repository {wanted.repo} of "
            f"its code host{at}; {put}"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                wanted.repo,
                wanted.file,
                revision=wanted.revision or None,
                local_dir=None if into is None else into / wanted.repo,
            )
        )
    except Exception as error:  # the client and what it stands on raise many unrelated types
        cause = hub_fault(wanted.repo, error)
        raise InputError(
            f"{what}: {wanted.file} of the hub repository {wanted.repo}{at} is not on this machine, and {cause}; "
            f"or download it elsewhere and {put}"
        ) from error


def verify_snapshot(folder: Path, repo: str) -> None:
    """Verifies the files of a downloaded repository that the catalogue pins at the snapshot's commit.

    Args:
      folder: of the snapshot; its name is the commit.
      repo: owner/name on the hub.

    Raises:
      InputError: one is not the published file.
    """
    for known in entries().values():
        path = folder / known.file
        if (known.repo, known.revision) == (repo, folder.name) and known.pinned and path.is_file():
            if not is_verified(path, known.name):
                logging.info("verifying %s", path)
            verify(path, known.name)


def get(name: str, into: Path | None = None) -> Path:
    """The file of a catalogue's entry as it is published, downloaded if it is not here, and verified.

    Args:
      name: of the entry.
      into: a folder that is to hold it, as ``OWNER/REPOSITORY/FILE``; None takes any place in which it is found.

    Raises:
      InputError: as ``find_weights``.
    """
    wanted = entry(name)
    path = located(wanted) if into is None else into / wanted.repo / wanted.file
    if path is None or not path.is_file():
        path = download(wanted, into)
    return verify(path, name)


def survey(weights_dir: str = "", verify_all: bool = False) -> tuple[list[tuple[str, ...]], list[str]]:
    """What there is of the catalogue on this machine.

    Args:
      weights_dir: a folder to look in first.
      verify_all: compute the checksum of every file that is there.

    Returns:
      For each entry its name, what needs it, size, licence and state; and a line for every file that is not the
      published one.
    """
    rows: list[tuple[str, ...]] = []
    faults = []
    for name, wanted in entries().items():
        path = located(wanted, weights_dir)
        if path is None:
            state = "not here" if wanted.host == "hub" else f"not here; get it by hand from {wanted.repo}"
        else:
            try:
                if verify_all:
                    verify(path, name, again=True)
                known = "verified" if is_verified(path, name) else "not verified yet"
                state = f"{known if wanted.pinned else 'not pinned'}: {path}"
            except InputError as error:
                faults.append(str(error))
                state = f"NOT the published file: {path}"
        size = f"{wanted.bytes / 1e6:.1f} MB" if wanted.bytes else ""
        rows.append((name, wanted.used_by, size, wanted.licence, state))
    return rows, faults
