"""The images or recordings that token shards stand for, where samples are windows of whole ones.

items.json lists them by part, in the order of their windows: those of an image row by row, those of
a recording in time. The last windows reach beyond an item's end; its size says where that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from simvq_moe.data.codes import Manifest
from simvq_moe.data.held_out import PARTS
from simvq_moe.files.regular import BrokenFileError, read_json, write_atomically

ITEMS = "items.json"


@dataclass(frozen=True)
class Item:
    """An image or a recording, or the side of it that training sees or that is held out."""

    name: str
    """Its place in the source."""
    size: tuple[int, ...]
    """Height and width of an image, samples of a recording, as the tokenizer is given them."""

    def grid(self, window: Sequence[int]) -> tuple[int, ...]:
        """Windows along each axis.

        Args:
            window: size of a window along each axis.
        """
        return tuple(-(-size // side) for size, side in zip(self.size, window, strict=True))


@dataclass(frozen=True)
class Items:
    """The content of items.json."""

    train: list[Item]
    held_out: list[Item]


def window_of(manifest: Manifest) -> tuple[int, ...]:
    """Size of a window along each axis."""
    return manifest.sample_shape[1:] if manifest.sample_rate == 0 else manifest.sample_shape


def write_items(folder: Path, items: Mapping[str, Sequence[Item]]) -> None:
    """Write items.json."""
    content = {part: [asdict(item) for item in items[part]] for part in PARTS}
    write_atomically(folder / ITEMS, json.dumps(content) + "\n")


def read_items(folder: Path, manifest: Manifest) -> dict[str, list[Item]]:
    """The items of both parts.

    Raises:
        BrokenFileError: they are not there, or are not those of the manifest.
    """
    found = read_json(folder / ITEMS, Items)
    window = window_of(manifest)
    parts = {"train": found.train, "held_out": found.held_out}
    for part, items in parts.items():
        sizes_fit = all(len(item.size) == len(window) and min(item.size) > 0 for item in items)
        if not sizes_fit or sum(prod(i.grid(window)) for i in items) != manifest.samples[part]:
            raise BrokenFileError(
                folder / ITEMS, f"has other {part} items than the manifest: encode again"
            )
    return parts
