"""Pieces of recordings are the same from anywhere, and headers are not trusted."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import simvq_moe.data.media.recordings as recordings
from simvq_moe.data.media.recordings import FORGETFUL, Part, header, piece
from simvq_moe.files.regular import BrokenFileError

RATE = 16_000
WRITABLE = [
    (kind, encoding)
    for kind in soundfile.available_formats()
    for encoding in soundfile.available_subtypes(kind)
    if kind != "RAW"
]
STEPS = {"MPEG_LAYER_III": 1, "OPUS": 33}
"""Steps of 16 bits by which a decoder may differ that has read other frames before; 0.1 %."""


def chirp(seconds: float, rate: int = RATE) -> np.ndarray:
    """A rising tone, loud and silent in turn, over a little noise: no two places are alike."""
    time = np.arange(round(seconds * rate)) / rate
    loud = np.sin(2 * np.pi * time / 1.7) > -0.5
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return loud * (0.4 * np.sin(2 * np.pi * (150 + 40 * time) * time) + noise)


def written(path: Path, kind: str, encoding: str, seconds: float = 9.0) -> Part:
    """A recording of that kind, at the rate that it allows."""
    for rate in (RATE, 8_000):
        try:
            soundfile.write(path, chirp(seconds, rate), rate, format=kind, subtype=encoding)
        except soundfile.LibsndfileError:
            continue
        found = header(path)
        if found is not None:
            return found
    pytest.skip("libsndfile can't write or read this kind")


def check_pieces(part: Part, rate: int, steps: int) -> None:
    whole = piece(part, 0, part.samples(rate), rate)
    assert whole is not None
    assert len(whole) == part.samples(rate)
    for place in (777, len(whole) // 2, len(whole) - 3_001):
        found = piece(part, place, place + 3_000, rate)
        assert found is not None
        error = np.abs(found.astype(int) - whole[place : place + 3_000])
        assert error.max() <= steps


@pytest.mark.parametrize(("kind", "encoding"), WRITABLE)
def test_a_piece_is_the_same_from_anywhere(kind: str, encoding: str, tmp_path: Path) -> None:
    seconds = 1.0 if encoding in FORGETFUL else 9.0
    part = written(tmp_path / "a", kind, encoding, seconds)
    check_pieces(part, part.rate, STEPS.get(encoding, 0))


@pytest.mark.parametrize(
    ("rate", "channels", "mode", "level"),
    [
        (8_000, 1, "CONSTANT", 0.99),
        (24_000, 2, "CONSTANT", 0.99),  # 3 bytes a frame, so that bits lie 85 frames back
        (44_100, 2, "VARIABLE", 0.5),
        (48_000, 1, "AVERAGE", 0.8),
    ],
)
def test_mp3_borrows_bits_of_frames_before(
    rate: int, channels: int, mode: str, level: float, tmp_path: Path
) -> None:
    samples = np.stack([chirp(9.0, rate)] * channels, 1)
    soundfile.write(tmp_path / "a.mp3", samples, rate, bitrate_mode=mode, compression_level=level)
    part = header(tmp_path / "a.mp3")
    assert part is not None
    check_pieces(part, rate, 1)


def test_a_piece_that_is_resampled_is_the_same_from_anywhere(tmp_path: Path) -> None:
    part = written(tmp_path / "a.wav", "WAV", "PCM_16")
    for rate in (8_000, 24_000, 44_100):
        check_pieces(part, rate, 0)


def test_the_cached_filter_is_that_of_scipy() -> None:
    from scipy.signal import resample_poly

    samples = chirp(0.2)
    for up, down in ((3, 2), (1, 2), (441, 160)):
        ours = recordings.resample(samples, RATE, RATE * up // down)
        assert np.array_equal(ours, resample_poly(samples, up, down))


def flac(folder: Path, total: int) -> Path:
    """A recording of 2 s whose header promises `total` frames."""
    path = folder / "a.flac"
    soundfile.write(path, chirp(2.0), RATE)
    content = bytearray(path.read_bytes())
    field = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
    content[18:26] = field.to_bytes(8, "big")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("promised", "believed"),
    [(0, 32_000), (100, 100), (32_000, 32_000), (40_000, 40_000), (2**36 - 1, 32_000)],
)
def test_a_length_that_no_file_of_that_size_can_have_is_counted(
    promised: int, believed: int, tmp_path: Path
) -> None:
    tracemalloc.start()
    part = header(flac(tmp_path, promised))
    assert part is not None
    assert part.end == believed
    found = piece(part, 0, part.samples(RATE), RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert len(found) == min(believed, 32_000)
    assert peak < 2**23


def test_an_hour_of_many_channels_is_read_in_little_memory(tmp_path: Path) -> None:
    channels, frames = 64, 4_000_000
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros((10, channels)), 48_000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    where = content.index(b"data") + 4
    content[where : where + 4] = struct.pack("<I", frames * channels * 2)
    path.write_bytes(content)
    os.truncate(path, where + 4 + frames * channels * 2)  # a hole, not on disk
    part = header(path)
    assert part is not None
    assert part.end == frames
    tracemalloc.start()
    found = piece(part, 1_000_000, 1_024_000, 24_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert len(found) == 24_000
    assert peak < 2**25


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_samples_that_are_not_finite_break_their_piece_alone(value: float, tmp_path: Path) -> None:
    samples = chirp(1.0)
    samples[8_000] = value
    soundfile.write(tmp_path / "a.wav", np.stack([samples] * 2, 1), RATE, subtype="DOUBLE")
    part = header(tmp_path / "a.wav")
    assert part is not None
    around = piece(part, 7_000, 9_000, RATE)
    assert around is None or np.isfinite(value)
    assert piece(part, 0, 4_000, RATE) is not None
    assert piece(part, 0, 2_000, 8_000) is not None


def test_what_is_damaged_is_no_piece_or_a_short_one(tmp_path: Path) -> None:
    for kind, encoding in (("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")):
        path = tmp_path / "a"
        part = written(path, kind, encoding, 5.0)
        content = path.read_bytes()
        for damaged in (content[:200], content[: len(content) // 2], b"", b"\0" * len(content)):
            path.write_bytes(damaged)
            found = piece(part, 0, part.end, RATE)
            assert found is None or len(found) < part.end


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails to read")
def test_a_disk_that_fails_is_no_damaged_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.symlink_to("/proc/self/mem")
    for read in (header, lambda path: piece(Part(path, 0, 100, RATE), 0, 100, RATE)):
        with pytest.raises(BrokenFileError, match=r"a\.wav can't be read now \(.+\): make it"):
            read(path)
    with pytest.raises(BrokenFileError, match=r"gone\.wav can't be read now \(No such file"):
        piece(Part(tmp_path / "gone.wav", 0, 100, RATE), 0, 100, RATE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recording_of_somebody_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, chirp(0.1), RATE)
    path.chmod(0)
    with pytest.raises(BrokenFileError, match=r"can't be read now \(Permission denied\)"):
        header(path)


def test_every_encoding_is_read_from_a_little_before_unless_it_is_known_to_forget() -> None:
    assert "MPEG_LAYER_III" not in FORGETFUL
    assert soundfile.available_subtypes().keys() >= FORGETFUL
