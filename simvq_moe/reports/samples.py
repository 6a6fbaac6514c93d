"""What models made of held-out data, small enough to be part of a page: images, sounds, texts."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from simvq_moe.analysis.arms import Arm, RunRecord
from simvq_moe.files.regular import BrokenFileError, is_inside, printable
from simvq_moe.runs.files import read_sample

LARGEST_IMAGE = 60_000
"""Bytes up to which a sample is embedded as it is; larger ones are recompressed."""
IMAGE_WIDTH = 768
MOST_PIXELS = 2**24
"""Pixels of a picture that is decoded, at most."""
CLIPS = 2
VERSIONS = 8
"""Versions of a clip, at most."""
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


def sample_of(arm: Arm, left_out: list[str] | None = None) -> Sample | None:
    """None where the arm has none that can be read.

    Args:
        left_out: gets a line for each file that can't be read.
    """
    for run in arm.runs:
        for file in reversed(run.samples):
            try:
                if found := _sample(arm, run, file):
                    return found
            except BrokenFileError as error:
                if left_out is not None:
                    left_out.append(str(error))
    return None


def _sample(arm: Arm, run: RunRecord, file: Path) -> Sample | None:
    if file.suffix == ".png":
        return Sample(arm.label, run.seed, image=_image(file, read_sample(run.path, file)))
    if file.suffix == ".txt":
        text = _text(read_sample(run.path, file))
        return Sample(arm.label, run.seed, text=text) if text else None
    if not is_inside(file, run.path):
        raise BrokenFileError(file, f"is a link out of {run.path}: its target is not read")
    sounds = _sounds(run, file)
    return Sample(arm.label, run.seed, sounds=sounds) if sounds else None


def _image(file: Path, content: bytes) -> str:
    """The image inline; a large one smaller."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=("PNG",))
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise BrokenFileError(
                file, f"has {width:,} x {height:,} pixels: at most {MOST_PIXELS:,} are shown"
            )
        with image:
            image.load()
            if len(content) <= LARGEST_IMAGE:
                return _uri("image/png", content)
            smaller = image.convert("RGB")
            smaller.thumbnail((IMAGE_WIDTH, IMAGE_WIDTH))
            stream = io.BytesIO()
            smaller.save(stream, format="JPEG", quality=88)
    except BrokenFileError:
        raise
    except Exception as error:  # Pillow's decoders raise anything at damaged bytes
        raise BrokenFileError(file, f"is no picture that can be decoded: {error}") from None
    return _uri("image/jpeg", stream.getvalue())


def _sounds(run: RunRecord, folder: Path) -> tuple[tuple[str, str], ...]:
    """The first clips, each with all its versions; too long ones are left out."""
    found = []
    for number in range(CLIPS):
        for file in sorted(folder.glob(f"{number}_*.wav"))[:VERSIONS]:
            content = read_sample(run.path, file)
            if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
                raise BrokenFileError(file, "is no WAV file")
            name = printable(file.stem.partition("_")[2])
            found.append((f"{number + 1} {name}", _uri("audio/wav", content)))
    return tuple(found)


def _text(content: bytes) -> str:
    text = content.decode(errors="replace").strip()
    lines = [printable(line.expandtabs(4)) for line in text[:LONGEST_TEXT].splitlines()]
    return "\n".join(lines) + ("…" if len(text) > LONGEST_TEXT else "")


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
