"""Audio in the training loop: held-out measures, recordings to listen to, discriminators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from simvq_moe.config.checks import check
from simvq_moe.config.schema import (
    AudioTokenizerConfig,
    Config,
    DataConfig,
    TrainConfig,
)
from simvq_moe.data.audio import AudioClips, audio_clips, resample
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.audio.spectra import MelDistance
from simvq_moe.models.audio.tokenizer import AudioTokenizer
from simvq_moe.quantizers.kinds.simvq import SimVQOptions
from simvq_moe.tasks.audio_measures import MEL_WINDOWS, AudioMeasures, pesq, si_sdr, stoi
from simvq_moe.tasks.registry import build_model, task_of
from tests.launching import metrics
from tests.short_training import train_flags, train_two_steps
from tests.two_ranks import TwoRanks

RATE = 8_000
JUDGED = AudioTokenizerConfig(
    hidden=2,
    strides=(8, 5),
    dilations=(1,),
    loss_windows=(64,),
    adversarial_weight=1.0,
    adversarial_start=1,
    discriminator_hidden=1,
    discriminator_periods=(2, 3),
    discriminator_windows=(64,),
)
CONFIG = Config(
    task="audio_tokenizer",
    data=DataConfig(sample_rate=RATE),
    quantizer=SimVQOptions(codes=16, width=4),
    audio_tokenizer=JUDGED,
    train=TrainConfig(batch_size=4),
)


def speech(seconds: float = 0.6, count: int = 4) -> torch.Tensor:
    """The loudest clips of embedded recordings one after another, as long as asked."""
    needed = count * int(-(-seconds // 0.2))
    clips, _ = audio_clips(
        "spoken-characters",
        sample_rate=RATE,
        length=RATE // 5,
        clips=4 * needed,
        held_out_clips=1,
        seed=3,
    )
    audio = clips.batch(np.arange(4 * needed))
    return audio[audio.square().sum(1).topk(needed).indices].reshape(count, -1)


def test_two_steps_with_discriminators_leave_measures_and_recordings(
    tmp_path: Path, world: World
) -> None:
    summary = train_two_steps(CONFIG, tmp_path, world)
    assert {"val/si_sdr", "val/mel_distance", "val/codes/used"} <= summary.keys()
    assert summary["val/loss"] == summary["val/mel_distance"]
    folder = tmp_path / "run" / "samples" / "val_000002"
    found = sorted(folder.iterdir())
    assert [file.name for file in found[:2]] == ["0_original.wav", "0_reconstruction.wav"]
    assert len(found) == 16
    for file in found:
        samples, rate = soundfile.read(file)
        assert (len(samples), rate) == (RATE // 5, RATE)
    _, held_out = audio_clips(
        "spoken-characters", sample_rate=RATE, length=1_600, clips=64, held_out_clips=18, seed=0
    )
    assert isinstance(held_out, AudioClips)
    second, _ = soundfile.read(folder / "1_original.wav", dtype="int16")
    assert np.array_equal(second, held_out.samples[2].numpy())


def test_counts_of_the_start_follow_accumulation() -> None:
    train = replace(CONFIG.train, accumulation=2)
    model = build_model(replace(CONFIG, train=train))
    assert isinstance(model, AudioTokenizer)
    assert model.adversarial_start == 2


def test_the_config_of_a_folded_audio_tokenizer_has_no_map() -> None:
    assert task_of(CONFIG).without_maps(CONFIG).quantizer.kind == "vq"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": ()}, r"strides \(\): give one or more, each at least 2"),
        ({"strides": (2, 1)}, r"strides \(2, 1\) < 2: use at least 2"),
        ({"loss_windows": (100,)}, r"loss_windows \(100,\): use multiples of 32"),
        ({"adversarial_weight": 0.0}, r"adversarial_start 1 means nothing with .*_weight 0"),
        ({"adversarial_start": 800}, r"adversarial_start 800 >= train.steps 800"),
        ({"mel_weight": -1.0}, r"mel_weight -1.0 < 0"),
        (
            {"mel_bands": (9, 9, 9)},
            r"mel_bands \(9, 9, 9\) with .*loss_windows .*: give \d, one for each",
        ),
        ({"discriminator_bands": (0.5, 0.5)}, r"discriminator_bands \(0.5, 0.5\) leave a band"),
        ({"discriminator_bands": (0.001,)}, r"discriminator_bands \(0.001,\) leave a band"),
    ],
)
def test_what_cannot_run_is_named(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"audio_tokenizer\.{words}"):
        check(replace(CONFIG, audio_tokenizer=replace(JUDGED, **changes)))


def test_clips_shorter_than_a_sample_are_named() -> None:
    data = replace(CONFIG.data, audio_seconds=0.0)
    with pytest.raises(ConfigError, match=r"data\.audio_seconds 0\.0 at .* less than a sample"):
        check(replace(CONFIG, data=data))


def test_si_sdr_is_that_of_torchmetrics() -> None:
    torch.manual_seed(0)
    clips = torch.randn(5, 400, dtype=torch.float64)
    scales = torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0], dtype=torch.float64)[:, None]
    reconstructions = -0.5 * clips + scales * torch.randn(5, 400, dtype=torch.float64)
    expected = scale_invariant_signal_distortion_ratio(reconstructions, clips)
    assert_close(si_sdr(clips, reconstructions), expected)


def test_si_sdr_is_bounded_for_equal_and_for_silent_reconstructions() -> None:
    clips = torch.randn(1, 400)
    assert_close(si_sdr(clips, clips), torch.tensor([100.0], dtype=torch.float64))
    # the bound is that of the squared cosine, 1e-5
    bound = torch.tensor([-50.0], dtype=torch.float64)
    assert_close(si_sdr(clips, clips * 0), bound, rtol=1e-5, atol=0)


def test_sums_over_batches_give_the_means_over_all_clips() -> None:
    measures, clips = AudioMeasures(RATE), speech()
    torch.manual_seed(0)
    noisy = clips + 0.02 * torch.randn_like(clips)
    sums = [measures.sums(clips[part], noisy[part]) for part in (slice(3), slice(3, 4), slice(0))]
    total = {name: float(sum(one[name] for one in sums)) for name in sums[0]}
    means = measures.means(total)
    assert_close(means["val/si_sdr"], float(si_sdr(clips, noisy).mean()))
    distance = MelDistance(RATE, MEL_WINDOWS)(noisy, clips)
    # float32 sums in another order
    assert_close(means["val/mel_distance"], float(distance), rtol=1e-5, atol=0)
    assert 0.3 < means["val/stoi"] < 1


def test_measures_are_of_what_is_heard() -> None:
    clips, loud = torch.rand(2, 2, 4_000) * 2 - 1
    loud *= 3
    measures = AudioMeasures(RATE)
    assert measures.sums(clips, loud) == measures.sums(clips, loud.clamp(-1, 1))


def test_silent_clips_count_in_the_mel_distance_alone() -> None:
    measures, clips = AudioMeasures(RATE), speech()
    clips[:2] = 0
    sums = measures.sums(clips, clips)
    assert {name: float(n) for name, n in sums.items() if name.endswith("/clips")} | {
        "pesq/clips": 2.0
    } == {"mel_distance/clips": 4, "si_sdr/clips": 2, "stoi/clips": 2, "pesq/clips": 2}
    silence = measures.sums(clips[:2], clips[:2])
    means = measures.means({name: float(value) for name, value in silence.items()})
    assert means == {"val/mel_distance": 0.0}


def test_stoi_is_1_for_equal_clips_and_none_for_short_ones() -> None:
    clip = speech(count=1)[0].double().numpy()
    assert_close(stoi(clip, clip, RATE), 1.0)
    assert stoi(clip, clip * 0, RATE) == 0
    for samples in (10, 1_600, 3_199, 3_300):
        short = np.zeros(samples)
        short[: samples // 2] = clip[: samples // 2]
        assert stoi(short, short, RATE) is None


def test_pesq_is_high_for_equal_clips_and_lowest_for_silence() -> None:
    pytest.importorskip("pesq", reason="needs the audio extra, which compiles C")
    clip = speech(count=1)[0].double().numpy()
    same, silent = pesq(clip, clip, RATE), pesq(clip, clip * 0, RATE)
    assert same is not None
    assert same > 4.5
    assert silent == 1
    assert pesq(clip[:800], clip[:800], RATE) is None
    faster = resample(clip, RATE, 24_000)
    wide = pesq(faster, faster, 24_000)
    assert wide is not None
    assert wide > 4.6


@pytest.mark.distributed
def test_two_ranks_play_the_same_game_as_one(
    tmp_path: Path, world: World, two_ranks: TwoRanks
) -> None:
    flags = (
        *("--task", "audio_tokenizer", "--data.sample_rate", "8000", "--data.crops", "64"),
        *("--data.held_out_crops", "18", "--quantizer.codes", "16", "--quantizer.width", "4"),
        *("--audio_tokenizer.hidden", "2", "--audio_tokenizer.strides", "8", "5"),
        *("--audio_tokenizer.loss_windows", "64", "--audio_tokenizer.adversarial_weight", "1.0"),
        *("--audio_tokenizer.adversarial_start", "2", "--audio_tokenizer.discriminator_hidden"),
        *("1", "--audio_tokenizer.discriminator_windows", "64", "--train.zero_stage", "2"),
        *("--train.steps", "5", "--train.batch_size", "8", "--train.log_every", "1"),
        *("--train.accumulation", "2", "--train.eval_every", "5"),
    )
    one = metrics(train_flags(world, tmp_path, "--name", "one", *flags))
    two = metrics(two_ranks(train_flags, tmp_path, "--name", "two", *flags)[0])
    played = [line["train/discriminator_loss"] > 0 for line in one]
    assert played == [False, False, True, True, True]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name.endswith("_loss") or name.startswith(("val/mel", "val/si", "train/grad")):
                # float32 sums in another order, over five steps of Adam
                assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
