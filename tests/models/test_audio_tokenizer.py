"""The audio tokenizer: encode, decode and reconstruct agree; losses are their formulas."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers.audio_utils import mel_filter_bank

from simvq_moe import VQ, ResidualQuantizer, SimVQ
from simvq_moe.models.audio.discriminators import Discriminators, SpectrumDiscriminator
from simvq_moe.models.audio.spectra import (
    FLOOR,
    MelDistance,
    SpectralDistance,
    Spectrogram,
    bands_of,
    mel_filters,
)
from simvq_moe.models.audio.tokenizer import AudioTokenizer, Snake
from simvq_moe.models.chunked import reach
from simvq_moe.quantizers import AnyQuantizer

WEIGHTS = {"waveform": 2.0, "spectral": 0.5, "mel": 3.0, "adversarial": 0.25, "feature": 1.5}


def tokenizer(quantizer: AnyQuantizer | None = None, **options: Any) -> AudioTokenizer:
    torch.manual_seed(0)
    settings = {"hidden": 4, "strides": (2, 3, 4), "dilations": (1, 3), "sample_rate": 8_000}
    settings |= {"loss_windows": (32, 64), "loss_weights": WEIGHTS}
    return AudioTokenizer(quantizer or SimVQ(32, 8), **(settings | options))


def noise(batch: int = 2, time: int = 240) -> Tensor:
    return torch.rand(batch, time) - 0.5


@pytest.mark.parametrize("strides", [(2,), (3,), (2, 3, 4), (5, 2)])
@pytest.mark.parametrize("time", [1, 119, 120, 121])
def test_decoding_the_ids_of_audio_gives_its_reconstruction(
    strides: tuple[int, ...], time: int
) -> None:
    model = tokenizer(strides=strides).eval()
    audio = noise(time=time)
    ids = model.encode(audio)
    assert ids.shape == (2, -(-time // model.hop))
    reconstruction, quantized = model.reconstruct(audio)
    assert reconstruction.shape == audio.shape
    assert_close(quantized.ids, ids)
    decoded = model.decode(ids)
    assert decoded.shape == (2, ids.shape[1] * model.hop)
    assert_close(decoded[:, :time], reconstruction, rtol=0, atol=0)


@pytest.mark.parametrize("strides", [(2,), (3,), (2, 3, 4), (5, 2)])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1_000])
def test_a_recording_in_chunks_is_that_of_the_whole(strides: tuple[int, ...], chunk: int) -> None:
    model = tokenizer(strides=strides, dilations=(1, 3, 9)).double().eval()
    audio = noise(time=100 * model.hop - 1).double()
    ids = model.encode(audio)
    assert torch.equal(model.encode(audio, chunk=chunk), ids)
    whole = model.decode(ids)
    assert_close(model.decode(ids, chunk=chunk), whole, rtol=0, atol=1e-12)


def test_what_a_chunk_is_given_beside_itself_is_what_it_depends_on() -> None:
    model = tokenizer(strides=(3, 2), dilations=(1, 3)).double().eval()
    audio = noise(batch=1, time=100 * model.hop).double().requires_grad_()
    latents = model.latents(audio)
    latents[0, 50].sum().backward()
    assert audio.grad is not None
    (seen,) = audio.grad[0].nonzero(as_tuple=True)
    far = ceil(reach(model.encoder, Fraction(1, model.hop)) + reach(model.to_latent, 1))
    furthest = max(50 - int(seen.min()) // model.hop, int(seen.max()) // model.hop - 50)
    assert furthest <= far <= furthest + 1


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_of_no_token_is_refused(chunk: int) -> None:
    model = tokenizer().eval()
    with pytest.raises(ValueError, match=f"chunk {chunk} must be at least 1 token"):
        model.encode(noise(), chunk=chunk)


def test_residual_levels_give_ids_of_every_level() -> None:
    model = tokenizer(ResidualQuantizer([SimVQ(32, 8), SimVQ(32, 8)])).eval()
    audio = noise()
    ids = model.encode(audio)
    assert ids.shape == (2, 10, 2)
    assert_close(model.decode(ids), model.reconstruct(audio)[0], rtol=0, atol=0)


def test_snake_is_its_formula() -> None:
    snake = Snake(2).double()
    with torch.no_grad():
        snake.frequency.copy_(torch.tensor([[0.5], [2.0]]))
    x = torch.linspace(-3, 3, 8, dtype=torch.float64).expand(1, 2, 8)
    expected = [[v + np.sin(a * v) ** 2 / a for v in x[0, 0].tolist()] for a in (0.5, 2.0)]
    assert_close(snake(x)[0], torch.tensor(expected, dtype=torch.float64))


def naive_magnitudes(x: Tensor, window: int) -> Tensor:
    """Magnitudes by the sum that defines the transform, in float64: (bins, frames)."""
    signal = np.pad(x.double().numpy(), window // 2)
    n = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(window // 2 + 1), n) / window)
    frames = [
        waves @ (hann * signal[start : start + window])
        for start in range(0, len(signal) - window + 1, window // 4)
    ]
    return torch.tensor(np.abs(np.stack(frames, axis=1)) / hann.sum())


def test_spectrograms_are_the_defining_sum() -> None:
    x = noise(1, 100).double()
    assert_close(Spectrogram(32)(x)[0], naive_magnitudes(x[0], 32), check_dtype=False)


def test_a_sine_of_amplitude_one_has_a_peak_of_a_half() -> None:
    sine = torch.sin(2 * torch.pi * 8 / 64 * torch.arange(640, dtype=torch.float64))[None]
    peak, place = Spectrogram(64)(sine)[0, :, 10].max(0)
    assert int(place) == 8
    assert_close(float(peak), 0.5)


def test_mel_filters_are_those_of_another_implementation() -> None:
    for rate, window in ((8_000, 512), (16_000, 1_024), (24_000, 2_048)):
        bands = bands_of(window)
        theirs = mel_filter_bank(
            window // 2 + 1, bands, 0.0, rate / 2, rate, norm=None, mel_scale="slaney"
        )
        assert_close(mel_filters(rate, window, bands), torch.tensor(theirs.T).float())


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize(("units", "norm"), [("sum", None), ("area", "slaney")])
def test_the_floor_is_that_of_other_implementations(
    scale: Any, units: Any, norm: str | None
) -> None:
    window, bands, floor, rate = 1_024, 100, 1e-2, 24_000
    x, y = noise(1, 3_000).double(), 1e-4 * noise(1, 3_000).double()
    theirs = mel_filter_bank(
        window // 2 + 1, bands, 0.0, rate / 2, rate, norm=norm, mel_scale=scale
    )
    logs = []
    for z in (x, y):
        magnitudes = naive_magnitudes(z[0], window) * window / 2
        logs.append((torch.tensor(theirs.T) @ magnitudes).clamp_min(floor).log10())
    assert float((logs[1] == torch.tensor(floor).log10()).double().mean()) > 0.1
    distance = MelDistance(rate, [window], bands=[bands], scale=scale, floor=floor, units=units)
    # float32 windows and filters limit what is computed in float64
    assert_close(distance(x, y), (logs[0] - logs[1]).abs().mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000])
def test_no_mel_band_is_empty(rate: int) -> None:
    for window in (32, 64, 128, 256, 512, 1_024, 2_048):
        assert float(mel_filters(rate, window, bands_of(window)).amax(1).min()) > 0


def test_distances_are_their_formulas() -> None:
    x, y = noise(1, 200).double(), noise(1, 200).double()
    y[:, 100:] = 0  # silence is compared at the floor
    linear, mel = [], []
    for window in (32, 64):
        a, b = (naive_magnitudes(z[0], window) for z in (x, y))
        logs = a.clamp_min(FLOOR).log() - b.clamp_min(FLOOR).log()
        linear.append((a - b).abs().mean() + logs.abs().mean())
        filters = mel_filters(8_000, window, bands_of(window)).double()
        logs = (filters @ a).clamp_min(FLOOR).log10() - (filters @ b).clamp_min(FLOOR).log10()
        mel.append(logs.abs().mean())
    # float32 windows and filters limit what is computed in float64
    spectral, mels = SpectralDistance((32, 64))(x, y), MelDistance(8_000, (32, 64))(x, y)
    assert_close(spectral, sum(linear) / 2, rtol=1e-5, atol=1e-6)
    assert_close(mels, sum(mel) / 2, rtol=1e-5, atol=1e-6)


def test_the_mel_distance_of_a_batch_is_the_mean_of_each() -> None:
    x, y = noise(3), noise(3)
    distance = MelDistance(8_000, (32, 64))
    each = [distance(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    assert_close(distance.of_each(x, y), torch.stack(each))
    assert_close(distance(x, y), torch.stack(each).mean())


def test_gradients_are_finite_where_audio_and_reconstruction_are_silent() -> None:
    silence = torch.zeros(2, 100, requires_grad=True)
    distance = SpectralDistance((32,))(silence, torch.zeros(2, 100))
    (distance + MelDistance(8_000, (32,))(silence, torch.zeros(2, 100))).backward()
    assert silence.grad is not None
    assert torch.equal(silence.grad, torch.zeros(2, 100))


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    model = tokenizer(VQ(32, 8, commitment_weight=0.5))
    audio = noise()
    loss, terms = model(audio)
    reconstruction, _ = model.reconstruct(audio)
    assert_close(terms["waveform_loss"], F.l1_loss(reconstruction, audio))
    assert set(terms) == {
        f"{name}_loss" for name in ("waveform", "spectral", "mel", "codebook", "commitment")
    }
    expected = 2 * terms["waveform_loss"] + 0.5 * terms["spectral_loss"] + 3 * terms["mel_loss"]
    assert_close(loss, expected + terms["codebook_loss"] + 0.5 * terms["commitment_loss"])


def test_a_quantizer_of_another_width_leaves_the_start_of_the_rest_alone() -> None:
    models = [tokenizer(quantizer) for quantizer in (SimVQ(32, 8), VQ(32, 4))]
    # the quantizers above were built before the seed was set
    for part in ("encoder", "decoder"):
        first, second = (getattr(model, part).state_dict() for model in models)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name])


def test_the_first_batch_starts_a_quantizer_that_waits_for_data() -> None:
    model = tokenizer(SimVQ(32, 8, init="data"))
    assert model.quantizer.waits_for_data
    model.initialize(noise())
    assert not model.quantizer.waits_for_data


def judged(**options: Any) -> AudioTokenizer:
    torch.manual_seed(1)
    return tokenizer(discriminators=Discriminators((2, 3), (32,), hidden=2), **options)


def gradients(model: AudioTokenizer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for name, p, gradient in zip(names, parameters, found, strict=True)
    }


@torch.no_grad()
def test_discriminators_score_and_are_scored_by_least_squares() -> None:
    model, audio = judged(), noise()
    assert model.discriminators is not None
    loss, terms = model(audio)
    reconstruction, _ = model.reconstruct(audio)
    real, fake = model.discriminators(audio), model.discriminators(reconstruction)
    adversarial, feature, discriminator, layers = 0.0, 0.0, 0.0, 0
    for a, b in zip(real, fake, strict=True):
        adversarial += float((1 - b[-1]).square().mean()) / 3
        discriminator += float((1 - a[-1]).square().mean() + b[-1].square().mean()) / 3
        for x, y in zip(a[:-1], b[:-1], strict=True):
            feature, layers = feature + float((x - y).abs().mean()), layers + 1
    assert_close(float(terms["adversarial_loss"]), adversarial, rtol=1e-5, atol=1e-6)
    assert_close(float(terms["feature_loss"]), feature / layers, rtol=1e-5, atol=1e-6)
    assert_close(float(terms["discriminator_loss"]), discriminator, rtol=1e-5, atol=1e-6)
    expected = sum(weight * terms[f"{name}_loss"] for name, weight in WEIGHTS.items())
    expected = expected + terms["discriminator_loss"] + terms["codebook_loss"]
    assert_close(loss, expected + 0.25 * terms["commitment_loss"])


def test_each_player_gets_the_gradient_of_its_own_loss_alone() -> None:
    model, audio = judged(), noise()
    loss, terms = model(audio)
    whole = gradients(model, loss)
    of_discriminators = gradients(model, terms["discriminator_loss"])
    of_the_rest = gradients(model, loss - terms["discriminator_loss"])
    assert any("discriminators" in name for name in whole)
    for name, gradient in whole.items():
        theirs = "discriminators" in name
        assert_close(gradient, (of_discriminators if theirs else of_the_rest)[name])
        assert torch.equal((of_the_rest if theirs else of_discriminators)[name], gradient * 0)
    verdict = gradients(model, terms["adversarial_loss"] + terms["feature_loss"])
    assert float(verdict["decoder.0.frequency"].abs().sum()) > 0


def test_discriminators_wait_for_their_start_with_gradients_of_zero() -> None:
    model, audio = judged(adversarial_start=2), noise()
    assert model.discriminators is not None
    played = []
    for _ in range(3):
        loss, terms = model(audio)
        played.append(float(terms["discriminator_loss"].detach()) > 0)
        if not played[-1]:
            found = torch.autograd.grad(loss, list(model.discriminators.parameters()))
            assert all(torch.equal(g, torch.zeros_like(g)) for g in found)
    assert played == [False, False, True]


def test_the_count_to_the_start_is_in_the_checkpoint_and_evaluation_does_not_move_it() -> None:
    model, audio = judged(adversarial_start=2), noise()
    model(audio)
    model.eval()(audio)
    again = judged(adversarial_start=2)
    again.load_state_dict(model.state_dict())
    assert int(again.forwards) == 1


def test_discriminators_leave_the_start_of_the_rest_alone() -> None:
    alone, both = tokenizer().state_dict(), judged().state_dict()
    assert all(torch.equal(both[name], tensor) for name, tensor in alone.items())
    assert len(both) > len(alone)


@pytest.mark.parametrize("time", [1, 60, 61])
def test_discriminators_take_any_length(time: int) -> None:
    scores = Discriminators((2, 3, 5), (32, 64), hidden=2)(noise(time=time))
    assert len(scores) == 5
    assert all(torch.isfinite(member[-1]).all() for member in scores)


def test_bands_of_the_spectrum_have_features_of_their_own() -> None:
    borders = (0.1, 0.25, 0.5, 0.75)
    judges = Discriminators((2, 3, 5, 7, 11), (512, 1_024, 2_048), hidden=2, borders=borders)
    activations = judges(noise(time=4_000))
    # 5 of each period, and 5 of each of 5 bands of each window, as DAC's
    assert sum(len(member[:-1]) for member in activations) == 100
    whole = SpectrumDiscriminator(512, 2, borders)
    assert sum(whole.sizes) == 257
    assert whole(noise(time=4_000))[-1].shape[1] == 1
    game = judges.play(noise(time=4_000), noise(time=4_000))
    assert all(torch.isfinite(term) for term in game)
