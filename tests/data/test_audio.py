"""Clips come from real recordings, and no held-out sample is heard in training."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.testing import assert_allclose

import simvq_moe.data.audio as audio
from simvq_moe.data.audio import (
    AudioClips,
    LazyClips,
    audio_clips,
    check_source,
    recording_windows,
    resample,
)
from simvq_moe.errors import ConfigError

RATE = 1_000
LENGTH = 50


def write_ramp(path: Path, seconds: float = 1.0, start: int = 0) -> None:
    """A recording whose samples are their own positions, so that a clip tells where it is from."""
    positions = np.arange(start, start + round(RATE * seconds), dtype=np.int16)
    soundfile.write(path, positions, RATE, subtype="PCM_16")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    write_ramp(tmp_path / "a.wav")
    write_ramp(tmp_path / "deep" / "b.flac", start=2_000)
    return tmp_path


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for i in range(40):
        values = np.full(60, i, dtype=np.int16)
        soundfile.write(tmp_path / f"{i:02}.wav", values, RATE, subtype="PCM_16")
    return tmp_path


def clips(
    source: Path | str, count: int = 50, held_out: int = 20, *, seed: int = 0, length: int = LENGTH
) -> tuple[AudioClips, AudioClips]:
    train, late = audio_clips(
        str(source),
        sample_rate=RATE,
        length=length,
        clips=count,
        held_out_clips=held_out,
        seed=seed,
    )
    assert isinstance(train, AudioClips)
    assert isinstance(late, AudioClips)
    return train, late


def test_the_embedded_recordings_are_read_without_importing_their_package() -> None:
    before = set(sys.modules)
    train, held_out = audio_clips(
        "spoken-characters", sample_rate=8_000, length=1_600, clips=500, held_out_clips=100, seed=0
    )
    assert not {"captcha", "librosa"} & (set(sys.modules) - before)
    assert isinstance(train, AudioClips)
    assert isinstance(held_out, AudioClips)
    assert train.samples.shape == (500, 1_600)
    assert held_out.samples.shape == (100, 1_600)
    assert train.samples.dtype == held_out.samples.dtype == torch.int16
    # speech, neither silence nor an alarm tone at full scale
    assert 0.02 < float(train.batch(np.arange(500)).square().mean().sqrt()) < 0.5


def test_few_recordings_are_cut_in_time_and_every_place_is_drawn(few: Path) -> None:
    train, held_out = clips(few, 40_000, 8_000)
    assert set(train.samples[:, 0].tolist()) == {
        *range(820 - LENGTH + 1),
        *range(2_000, 2_820 - LENGTH + 1),
    }
    assert set(held_out.samples[:, 0].tolist()) == {
        *range(820, 1_000 - LENGTH + 1),
        *range(2_820, 3_000 - LENGTH + 1),
    }


def test_a_clip_is_a_run_of_neighbouring_samples(few: Path) -> None:
    train, _ = clips(few)
    positions = train.samples - train.samples[:, :1]
    assert torch.equal(positions.long(), torch.arange(LENGTH).expand(50, LENGTH))


def test_resampling_mixes_nothing_across_the_border(tmp_path: Path) -> None:
    # silence before the border, noise after it
    samples = np.zeros(4_000)
    samples[3_280:] = np.random.default_rng(0).uniform(-1, 1, 720)
    soundfile.write(tmp_path / "a.wav", samples, 2 * RATE)
    train, held_out = clips(tmp_path, 2_000)
    assert int(train.samples.abs().max()) == 0
    assert int(held_out.samples.abs().max()) > 3_000


def test_batches_map_16_bits_onto_minus_one_to_one(few: Path) -> None:
    train, _ = clips(few)
    train.samples[0, :2] = torch.tensor([-32_768, 16_384], dtype=torch.int16)
    batch = train.batch(np.array([0, 3]))
    assert batch.dtype == torch.float32
    assert batch[0, :2].tolist() == [-1.0, 0.5]
    assert torch.equal(batch[1] * 32_768, train.samples[3].float())
    assert torch.equal(train.batch(torch.tensor([0, 3])), batch)


def test_the_seed_alone_decides_the_clips(few: Path) -> None:
    first, again, other = (clips(few, seed=seed) for seed in (0, 0, 1))
    for side in range(2):
        assert torch.equal(first[side].samples, again[side].samples)
        assert not torch.equal(first[side].samples, other[side].samples)


def test_many_recordings_are_split_by_file(many: Path) -> None:
    train, held_out = clips(many, 2_000, 400)
    seen, unseen = train.samples.unique().tolist(), held_out.samples.unique().tolist()
    assert sorted(seen + unseen) == list(range(40))
    assert 1 <= len(unseen) <= 10


def test_longer_recordings_give_more_clips(tmp_path: Path) -> None:
    for name, seconds in (("a", 10.0), ("b", 1.0)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(round(RATE * seconds), 0.1), RATE)
    write_ramp(tmp_path / "c.wav")
    train, _ = clips(tmp_path, 6_000)
    ramps = int((train.samples[:, 0] != train.samples[:, 1]).sum())
    # 771 of 9,693 places; four standard deviations are 87
    assert abs(ramps - 6_000 * 771 / 9_693) < 87


def test_resampling_keeps_a_tone_and_drops_what_the_lower_rate_cannot_hold() -> None:
    time = np.arange(24_000) / 24_000
    low, high = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 11_000 * time)
    down = resample(low + high, 24_000, 16_000)
    assert len(down) == 16_000
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    # 1 %: the filter's ripple; its tail reaches over the ends
    assert_allclose(down[200:-200], expected[200:-200], atol=0.01)
    up = resample(low, 24_000, 48_000)
    assert_allclose(up[200:-200:2], low[100:-100], atol=0.01)
    assert np.array_equal(resample(low, 24_000, 24_000), low)


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([np.full(1_000, 0.5), np.full(1_000, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE)
    train, _ = clips(tmp_path)
    assert train.batch(np.array([0])).unique().tolist() == [0.125]


def test_a_float_recording_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1_000, -1.5), RATE, subtype="FLOAT")
    train, _ = clips(tmp_path)
    assert train.samples.unique().tolist() == [-32_768]


def test_one_recording_is_a_source(few: Path) -> None:
    assert len(clips(few / "a.wav")[0]) == 50


def test_bad_recordings_are_skipped_with_one_line_that_names_them(
    few: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = (few / "deep" / "b.flac").read_bytes()
    (few / "no_recording.mp3").write_text("hello")
    (few / "headerless.raw").write_bytes(b"\0" * 4_000)
    # longer than the others, so that it is among those that are drawn from
    write_ramp(few / "damaged.flac", 20.0)
    damaged = bytearray((few / "damaged.flac").read_bytes())
    damaged[len(damaged) // 4 : len(damaged) // 2] = b"\0" * (len(damaged) // 4)
    (few / "damaged.flac").write_bytes(damaged)
    (few / "truncated.flac").write_bytes(content[:30])
    soundfile.write(few / "not_finite.wav", np.full(9_000, np.nan), RATE, subtype="FLOAT")
    write_ramp(few / "too_short.wav", (LENGTH - 1) / RATE)
    write_ramp(few / "short_late_part.wav", 0.25)
    (few / "README.txt").write_text("about these recordings")
    with caplog.at_level(logging.WARNING):
        train, held_out = clips(few)
    (record,) = caplog.records
    assert "skipped 7 unreadable or too short recordings" in record.getMessage()
    for name in ("headerless", "no_recording", "short_late_part", "too_short", "truncated"):
        assert name in record.getMessage()
    assert "README" not in record.getMessage()
    # what the damaged recordings would have given comes from the others
    assert (len(train), len(held_out)) == (50, 20)
    assert set(train.samples[:, 0].tolist()) < {*range(820), *range(2_000, 2_820)}


def test_a_good_folder_warns_of_nothing(few: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips(few)
    clips("spoken-characters")
    assert not caplog.records


@pytest.mark.parametrize("make", [clips, check_source])
def test_a_missing_folder_is_named_with_the_way_out(make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source .*nowhere.* does not exist: .*'spoken-"):
        make(str(tmp_path / "nowhere"))


def test_the_error_of_missing_prompts_says_what_installs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(audio, "ASTERISK", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="apt-get install asterisk-core-sounds-en-wav"):
        check_source("asterisk")
    write_ramp(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "ASTERISK", tmp_path)
    check_source("asterisk")
    assert len(clips("asterisk")[0]) == 50


def test_a_folder_without_recordings_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no recording")
    with pytest.raises(ConfigError, match=r"data\.source .* holds no readable recording: .*flac"):
        check_source(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.source .* holds no recording"):
        clips(tmp_path)


def test_clips_longer_than_the_recordings_name_the_length(few: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.audio_seconds 2: lower it"):
        clips(few, length=2_000)


def test_recordings_too_short_to_be_cut_in_two_are_named(tmp_path: Path) -> None:
    write_ramp(tmp_path / "a.wav", seconds=1 / RATE)
    with pytest.raises(ConfigError, match="each cut in two"):
        clips(tmp_path, length=1)


def test_only_damaged_recordings_are_an_error(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1_000, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(ConfigError, match="holds no recording that is readable"):
        clips(tmp_path)


def test_sources_with_a_recording_pass_the_check(few: Path) -> None:
    check_source("spoken-characters")
    check_source(str(few))


def lazy(
    source: Path | str, rate: int = RATE, memory: int = 0, length: int = LENGTH
) -> tuple[LazyClips, LazyClips]:
    train, late = audio_clips(
        str(source),
        sample_rate=rate,
        length=length,
        clips=200,
        held_out_clips=100,
        seed=0,
        memory=memory,
    )
    assert isinstance(train, LazyClips)
    assert isinstance(late, LazyClips)
    return train, late


@pytest.mark.parametrize("rate", [1_000, 750, 1_600, 333])
def test_a_set_too_large_for_memory_has_the_same_clips(rate: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        noise = rng.integers(-9_000, 9_000, size=(1_500 + 100 * i, 2), dtype=np.int16)
        soundfile.write(tmp_path / f"{i}.wav", noise, RATE, subtype="PCM_16")
    whole = audio_clips(
        str(tmp_path), sample_rate=rate, length=LENGTH, clips=200, held_out_clips=100, seed=0
    )
    for part, late in zip(whole, lazy(tmp_path, rate), strict=True):
        indices = np.arange(len(part))
        torch.testing.assert_close(late.batch(indices), part.batch(indices), rtol=0, atol=0)
        again = np.array([7, 0, 7])
        torch.testing.assert_close(late.batch(again), part.batch(again), rtol=0, atol=0)


def test_clips_are_kept_up_to_the_given_memory(many: Path) -> None:
    train, _ = lazy(many, memory=2 * LENGTH * 10)
    first = train.batch(np.arange(30))
    assert len(train.kept) == 10
    for path in many.iterdir():
        path.unlink()
    kept = sorted(train.kept)
    torch.testing.assert_close(train.batch(np.array(kept)), first[kept])


def test_a_recording_found_damaged_late_is_replaced_and_named_once(
    many: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, _ = lazy(many)
    before = train.batch(np.arange(200))
    named = train.parts[int(train.part_of[0])].path
    named.write_bytes(named.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        after = train.batch(np.arange(200))
        train.batch(np.arange(200))
    (record,) = caplog.records
    assert record.getMessage() == f"skipped damaged recording 1: {named.name}"
    hit = torch.from_numpy(train.part_of == train.part_of[0])
    torch.testing.assert_close(after[~hit], before[~hit])
    assert not (after[hit] == before[hit]).any()


def test_digests_tell_sets_of_clips_apart(few: Path, many: Path) -> None:
    assert lazy(many)[0].digest() == lazy(many)[0].digest()
    assert len({part.digest() for part in (*lazy(many), *clips(few), *clips(few, seed=1))}) == 6


def test_digests_tell_rates_and_lengths_apart_also_where_every_clip_is_a_whole_recording(
    many: Path,
) -> None:
    settings = [(RATE, 60), (2 * RATE, 120), (RATE // 2, 30)]
    found = [part.digest() for rate, length in settings for part in lazy(many, rate, length=length)]
    windows = [
        recording_windows(str(many), sample_rate=rate, length=length)
        for rate, length in (*settings, (RATE, 70))
    ]
    found += [part.digest() for parts in windows for part in parts]
    assert len(set(found)) == len(found)


def write_speakers(folder: Path, layout: str, speakers: int = 12) -> None:
    """Recordings of constant samples, whose value is the speaker."""
    for speaker in range(speakers):
        for i in range(3):
            path = folder / layout.format(s=100 + speaker, c=i // 2, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = np.full(200 + i, 1 + speaker, dtype=np.int16)
            soundfile.write(path, samples, RATE, subtype="PCM_16")


@pytest.mark.parametrize(
    "layout",
    [
        "{s}/{c}/{s}_{c}_{i}.wav",  # LibriTTS
        "train-clean-100/{s}/{c}/{s}-{c}-{i}.flac",  # LibriSpeech
        "wav48/p{s}/p{s}_{i}.wav",  # VCTK
        "speaker{s}/chapter{c}/utterance{i}.wav",
    ],
)
@pytest.mark.parametrize("speakers", [3, 12])
def test_no_voice_is_on_both_sides(layout: str, speakers: int, tmp_path: Path) -> None:
    write_speakers(tmp_path, layout, speakers)
    train, held_out = clips(tmp_path, 2_000, 400)
    heard, unheard = set(train.samples.unique().tolist()), set(held_out.samples.unique().tolist())
    assert heard | unheard == set(range(1, 1 + speakers))
    assert heard
    assert unheard
    assert not heard & unheard


def test_a_copy_is_on_the_side_of_its_original(many: Path) -> None:
    for i, path in enumerate(sorted(many.iterdir())):
        path.with_name(f"copy{i % 7}_{i}.wav").write_bytes(path.read_bytes())
    train, held_out = clips(many, 4_000, 800)
    seen, unseen = train.samples.unique().tolist(), held_out.samples.unique().tolist()
    assert sorted(seen + unseen) == list(range(40))


def test_other_contents_of_the_same_names_are_another_set(many: Path) -> None:
    before = [part.digest() for part in lazy(many)]
    for path in many.iterdir():
        soundfile.write(path, soundfile.read(path, dtype="int16")[0] + 1, RATE, subtype="PCM_16")
    assert not set(before) & {part.digest() for part in lazy(many)}


@pytest.mark.parametrize("memory", [0, 2**30])
def test_names_that_are_not_utf_8_are_names(
    memory: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ramp(tmp_path / "a.wav")
    for i in range(25):
        content = (tmp_path / "a.wav").read_bytes()[: -2 * i or None]
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9_%d.wav" % i)).write_bytes(content)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[2J.wav")).write_bytes(b"no recording")
    with caplog.at_level(logging.WARNING):
        train, _ = audio_clips(
            os.fspath(tmp_path),
            sample_rate=RATE,
            length=LENGTH,
            clips=50,
            held_out_clips=5,
            seed=0,
            memory=memory,
        )
    assert len(train.batch(np.arange(50))) == 50
    assert train.digest()
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    recording_windows(os.fspath(tmp_path), sample_rate=RATE, length=LENGTH)


def test_folders_behind_links_are_searched_once(few: Path, tmp_path_factory) -> None:
    linked = tmp_path_factory.mktemp("linked")
    (linked / "there").symlink_to(few, target_is_directory=True)
    (few / "back").symlink_to(linked, target_is_directory=True)
    train, _ = recording_windows(str(linked), sample_rate=RATE, length=LENGTH)
    assert train.names == ["there/a.wav", "there/deep/b.flac"]


def cut_short(path: Path) -> None:
    """A recording whose header promises 40,000 frames, of which the last quarter is not there."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 40_000)
    if path.suffix == ".flac":  # its last frame must be whole
        soundfile.write(path, samples[:30_000], 16_000)
        content = bytearray(path.read_bytes())
        field = int.from_bytes(content[18:26], "big") >> 36 << 36 | 40_000
        content[18:26] = field.to_bytes(8, "big")
        path.write_bytes(content)
        return
    soundfile.write(path, samples, 16_000)
    content = path.read_bytes()
    path.write_bytes(content[: 3 * len(content) // 4])


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg", "wav", "aiff"])
def test_a_recording_that_ends_early_is_cut_alike_in_memory_and_batch_by_batch(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        write_ramp(tmp_path / f"{i:02}.wav", start=30 * i)
    cut_short(tmp_path / f"short.{suffix}")
    with caplog.at_level(logging.WARNING):
        whole, batchwise = (
            audio_clips(
                str(tmp_path),
                sample_rate=RATE,
                length=LENGTH,
                clips=300,
                held_out_clips=100,
                seed=0,
                memory=memory,
            )
            for memory in (2**30, 0)
        )
        for a, b in zip(whole, batchwise, strict=True):
            # one step, for decoders that remember
            torch.testing.assert_close(
                a.batch(np.arange(len(a))), b.batch(np.arange(len(b))), rtol=0, atol=1.1 / 2**15
            )
    promised = soundfile.info(tmp_path / f"short.{suffix}").frames
    messages = [record.getMessage() for record in caplog.records]
    if promised == 40_000:
        assert len(messages) == 2
        cut = f"cut 1 recordings that are shorter than their headers say: short.{suffix}"
        assert messages[0].endswith(cut)
        late = f"cut recording that is shorter than its header says 1: short.{suffix}"
        assert messages[1] == late
    else:  # libsndfile knew it
        assert not messages


@pytest.mark.parametrize("rate", [1, 99, 10**6, 10**9, 2**31 - 1])
def test_absurd_sample_rates_are_skipped_by_name(
    rate: int, few: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray((few / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (few / "odd.wav").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        clips(few)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "skipped 1 recordings of sample rates outside 100 to 768,000 Hz: odd.wav"
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails to read")
def test_a_recording_that_cannot_be_read_now_is_one_line(few: Path) -> None:
    (few / "notes.txt").symlink_to("/proc/self/mem")
    clips(few)
    (few / "failing.wav").symlink_to("/proc/self/mem")
    for make in (
        clips,
        lazy,
        lambda source: recording_windows(str(source), sample_rate=9, length=9),
    ):
        with pytest.raises(ConfigError, match=r"failing\.wav can't be read now"):
            make(few)


def test_a_set_in_memory_takes_no_more_than_its_clips_and_a_piece(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(6_000_000, dtype=np.int16), 48_000)
    importlib.import_module("scipy.signal")  # what resamples; its code is not memory of the set
    tracemalloc.start()
    clips(tmp_path, length=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 2^20 samples at 48 kHz in float64, three times at once
    assert peak < 2**25


@pytest.mark.parametrize("length", [1, 7, LENGTH, 5_000])
@pytest.mark.parametrize("rate", [RATE, 750, 1_600])
def test_windows_cover_every_sample_once(length: int, rate: int, few: Path) -> None:
    write_ramp(few / "short.wav", 0.02, start=9_000)
    sides = recording_windows(str(few), sample_rate=rate, length=length)
    for side, windows in zip(("early", "late"), sides, strict=True):
        assert windows.names == ["a.wav", "deep/b.flac", "short.wav"]
        samples, lengths = windows.read(np.arange(len(windows)))
        assert np.array_equal(lengths, windows.lengths)
        assert samples.shape == (len(windows), length)
        for number, part in enumerate(windows.parts):
            mine = np.flatnonzero(windows.recording_of == number)
            found = np.concatenate([samples[i, : lengths[i]] for i in mine])
            frames, _ = soundfile.read(part.path)
            border = int(0.82 * len(frames))
            frames = frames[:border] if side == "early" else frames[border:]
            expected = np.rint(resample(frames, RATE, rate) * 2**15).clip(-(2**15), 2**15 - 1)
            assert_allclose(found * 2**15, expected)
        assert not samples.numpy()[np.arange(length) >= lengths[:, None]].any()
    named = [name for name, _ in sides[0]]
    assert named == [sides[0].names[i] for i in sides[0].recording_of]


def test_windows_and_clips_have_the_same_sides(many: Path) -> None:
    write_ramp(many / "too_short_for_a_clip.wav", 0.01)
    heard = {int(value) for part in clips(many, 4_000, 800)[:1] for value in part.samples.unique()}
    train, held_out = recording_windows(str(many), sample_rate=RATE, length=LENGTH)
    for windows, expected in ((train, heard), (held_out, set(range(40)) - heard)):
        found = {int(name[:2]) for name in windows.names if not name.startswith("too")}
        assert found == expected
    assert len(train.names) + len(held_out.names) == 41


def test_what_a_window_lacks_is_silence_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        write_ramp(tmp_path / f"{i:02}.wav")
    cut_short(tmp_path / "short.flac")
    with caplog.at_level(logging.WARNING):
        for windows in recording_windows(str(tmp_path), sample_rate=16_000, length=1_000):
            samples, lengths = windows.read(np.arange(len(windows)))
            assert not samples.numpy()[np.arange(1_000) >= lengths[:, None]].any()
            assert (lengths <= windows.lengths).all()
    assert [record.getMessage() for record in caplog.records] == [
        "cut recording that is shorter than its header says 1: short.flac"
    ]


def test_a_window_is_the_same_whatever_is_read_beside_it(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 4_000)
    samples[2_222] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", samples[:1_950], RATE, subtype="GSM610")
    (windows, _) = recording_windows(str(tmp_path), sample_rate=RATE, length=LENGTH)
    whole, lengths = windows.read(np.arange(len(windows)))
    assert np.flatnonzero(lengths == 0).tolist() == [2_222 // LENGTH]
    for indices in ([44], [3, 4, 5], [5, 4, 3], [43, 44, 45], [64, 65, 66], [], [7, 7]):
        some, some_lengths = windows.read(np.array(indices, dtype=np.int64))
        assert torch.equal(some, whole[torch.tensor(indices, dtype=torch.int64)])
        assert np.array_equal(some_lengths, lengths[np.array(indices, dtype=np.int64)])
    found = [window for _, window in windows]
    assert [len(window) for window in found] == lengths.tolist()


def test_a_held_out_source_gives_all_held_out_clips_and_nothing_of_it_is_trained_on(
    tmp_path: Path,
) -> None:
    for i in range(30):
        folder = tmp_path / ("train" if i < 20 else "val")
        folder.mkdir(exist_ok=True)
        write_constant(folder / f"{i:02}.wav", i)
    write_constant(tmp_path / "train" / "copy.wav", 25)
    held_out = str(tmp_path / "val")
    train, late = audio_clips(
        str(tmp_path / "train"),
        sample_rate=RATE,
        length=LENGTH,
        clips=200,
        held_out_clips=100,
        seed=0,
        held_out_source=held_out,
    )
    assert values(train) == set(range(20))
    assert values(late) == set(range(20, 30))
    whole = {"sample_rate": RATE, "length": LENGTH}
    windows, held = recording_windows(str(tmp_path / "train"), held_out_source=held_out, **whole)
    assert windows.names == [f"{i:02}.wav" for i in range(20)]
    assert held.names == [f"{i:02}.wav" for i in range(20, 30)]
    with pytest.raises(ConfigError, match=r"data\.held_out_source .* holds every recording of"):
        recording_windows(held_out, held_out_source=str(tmp_path), **whole)


def write_constant(path: Path, value: int) -> None:
    soundfile.write(path, np.full(60, value, dtype=np.int16), RATE, subtype="PCM_16")


def values(clips: AudioClips | LazyClips) -> set[int]:
    found = clips.batch(np.arange(len(clips)))[:, 0] * 2**15
    return {round(float(value)) for value in found}
