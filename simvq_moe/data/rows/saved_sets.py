"""Data sets that `datasets` has saved to disk: a folder of Arrow files, or of a folder a split.

Such a folder may be anybody's. Of its JSON only the names of Arrow files are believed, which must
lie in the folder itself; nothing in it is code, and Arrow files are read as `load_from_disk` reads
them, by pyarrow, whose errors are one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, printable, read_json

SPLITS, STATE = "dataset_dict.json", "state.json"
TRAIN = "train"
HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Splits that are held out, the first of them that there is."""


def _plain(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError("must be the name of a file or folder in it")
    return name


Name = Annotated[str, AfterValidator(_plain)]


class SplitsContent(TypedDict):
    """What is read of dataset_dict.json."""

    splits: Annotated[list[Name], Field(min_length=1)]


class ShardContent(TypedDict):
    filename: Name


class StateContent(TypedDict):
    """What is read of state.json."""

    _data_files: Annotated[list[ShardContent], Field(min_length=1)]


def is_saved_set(source: str) -> bool:
    """Whether a source is a split that was saved, `Dataset.save_to_disk`."""
    return all(os.path.isfile(os.path.join(source, name)) for name in (STATE, "dataset_info.json"))


def own_splits(source: str, held_out_source: str | None) -> tuple[str, str | None]:
    """What training and held-out data are read from; of splits that were saved together,
    `DatasetDict.save_to_disk`, their folders.

    Args:
        held_out_source: what the user named; None: the source's own held-out split, if it has one.

    Raises:
        ConfigError: there is no split for training, or the list of splits is broken.
    """
    held_out = held_out_source
    if held_out is not None and (names := _splits(held_out)):
        held_out = str(Path(held_out, next((s for s in HELD_OUT if s in names), names[0])))
    if not (names := _splits(source)):
        return source, held_out
    if TRAIN not in names:
        listed = ", ".join(map(printable, names))
        raise ConfigError(
            f"data.source {source!r} has no split {TRAIN!r} among {listed}: name the folder of one "
            "of them as data.source, and of another as data.held_out_source"
        )
    own = next((str(Path(source, split)) for split in HELD_OUT if split in names), None)
    return str(Path(source, TRAIN)), held_out or own


def _splits(source: str) -> Sequence[str]:
    file = Path(source, SPLITS)
    try:
        return read_json(file, SplitsContent)["splits"] if os.path.isfile(file) else ()
    except BrokenFileError as error:
        raise ConfigError(f"data.source {source!r}: {error}") from None


def shards(folder: Path) -> list[Path]:
    """The Arrow files of a saved split, in order.

    Raises:
        ConfigError: their list is broken, or one of them is not there.
    """
    try:
        listed = read_json(folder / STATE, StateContent)["_data_files"]
    except BrokenFileError as error:
        raise ConfigError(f"data.source {str(folder)!r}: {error}") from None
    found = [folder / one["filename"] for one in listed]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise ConfigError(
                f"data.source {str(folder)!r}: its {STATE} names {path.name}, which is no file in "
                "it: save the data set again"
            )
    return found
