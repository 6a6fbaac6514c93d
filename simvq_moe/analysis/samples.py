"""What models made of held-out data, small enough to be part of a page: images, sounds, texts."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from simvq_moe.analysis.runs import Arm

LARGEST_IMAGE = 60_000
"""Bytes up to which a sample is embedded as it is; larger ones are recompressed."""
IMAGE_WIDTH = 768
LARGEST_SOUND = 200_000
CLIPS = 2
LONGEST_TEXT = 2_000


@dataclass(frozen=True)
class Sample:
    """The latest sample of one arm's first run that has one."""

    label: str
    seed: int
    image: str = ""
    """A data URI."""
    sounds: tuple[tuple[str, str], ...] = ()
    """(name, data URI)."""
    text: str = ""


def sample_of(arm: Arm) -> Sample | None:
    """None where the arm has none that can be read."""
    for run in arm.runs:
        for file in reversed(run.samples):
            if file.is_dir() and (sounds := _sounds(file)):
                return Sample(arm.label, run.seed, sounds=sounds)
            if file.suffix == ".png" and (image := _image(file)):
                return Sample(arm.label, run.seed, image=image)
            if file.suffix == ".txt" and (text := _text(file)):
                return Sample(arm.label, run.seed, text=text)
    return None


def _image(file: Path) -> str | None:
    """The image inline; a large one smaller; None if it can't be read (a run killed writing it)."""
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) <= LARGEST_IMAGE:
                return _uri("image/png", content)
            image = image.convert("RGB")
            image.thumbnail((IMAGE_WIDTH, IMAGE_WIDTH))
            stream = io.BytesIO()
            image.save(stream, format="JPEG", quality=88)
    except (OSError, SyntaxError):
        return None
    return _uri("image/jpeg", stream.getvalue())


def _sounds(folder: Path) -> tuple[tuple[str, str], ...]:
    """The first clips, each with all its versions; too long ones are left out."""
    found = []
    for file in sorted(folder.glob("*.wav")):
        number, _, name = file.stem.partition("_")
        if number.isdigit() and int(number) < CLIPS and file.stat().st_size <= LARGEST_SOUND:
            found.append((f"{int(number) + 1} {name}", _uri("audio/wav", file.read_bytes())))
    return tuple(found)


def _text(file: Path) -> str:
    content = file.read_text(errors="replace").strip()
    return content[:LONGEST_TEXT] + ("…" if len(content) > LONGEST_TEXT else "")


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
