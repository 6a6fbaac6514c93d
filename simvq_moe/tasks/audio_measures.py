"""How well recordings survive: SI-SDR, mel distance, and where installed STOI and PESQ."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.data.audio import resample
from simvq_moe.models.audio.spectra import MelDistance

MEL_WINDOWS = (512, 2048)
"""Samples of the held-out mel distance's windows, whatever those of the loss are."""
AUDIBLE = 1e-3
"""Root mean square from which a clip counts as sound, -60 dB of full scale."""
STOI_SECONDS = 0.4
"""STOI needs 30 frames of 12.8 ms."""
WIDE_BAND, NARROW_BAND = 16_000, 8_000
"""Rates in Hz that PESQ knows."""

Pair = tuple[np.ndarray, np.ndarray]


class AudioMeasures(nn.Module):
    """Sums over held-out clips, and the means of summed sums.

    SI-SDR in dB, STOI and PESQ are means over audible clips alone: silence has neither. STOI needs
    pystoi and about 0.4 s of speech in a clip, PESQ needs pesq and 0.25 s; clips without are left
    out, and so is a measure that no clip has. The mel distance is that of log10 magnitudes of 80
    and 320 bands; others' have other bands, floors and logarithms, and do not compare.

    Args:
        sample_rate: Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.mel = MelDistance(sample_rate, MEL_WINDOWS)
        self.perceptual: dict[str, Callable[[Pair], float | None]] = {}
        if find_spec("pystoi"):
            self.perceptual["stoi"] = lambda pair: stoi(*pair, sample_rate)
        if find_spec("pesq"):
            self.perceptual["pesq"] = lambda pair: pesq(*pair, sample_rate)

    def sums(
        self, clips: Float[Tensor, "batch time"], reconstructions: Float[Tensor, "batch time"]
    ) -> dict[str, Tensor]:
        """Each measure summed over clips that have it, and `<measure>/clips`, their number.

        What exceeds full scale is cut off, as it is where reconstructions are played or written.
        """
        reconstructions = reconstructions.clamp(-1, 1)
        audible = clips.double().square().mean(1).sqrt() >= AUDIBLE
        values = {"mel_distance": clips.new_zeros(0)}
        if len(clips):  # there is no Fourier transform of nothing
            values["mel_distance"] = self.mel.of_each(reconstructions, clips)
        values["si_sdr"] = si_sdr(clips, reconstructions)[audible]
        pairs = [
            (a.double().cpu().numpy(), b.double().cpu().numpy())
            for a, b in zip(clips[audible], reconstructions[audible], strict=True)
        ]
        for name, of_pair in self.perceptual.items():
            found = [value for value in map(of_pair, pairs) if value is not None]
            values[name] = torch.tensor(found, dtype=torch.float64)
        sums = {name: value.double().sum() for name, value in values.items()}
        return sums | {f"{name}/clips": torch.tensor(float(len(v))) for name, v in values.items()}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`val/<measure>` of each measure that a clip has."""
        names = ("si_sdr", "mel_distance", *self.perceptual)
        counts = {name: sums[f"{name}/clips"] for name in names}
        return {f"val/{name}": sums[name] / counts[name] for name in names if counts[name]}


def si_sdr(
    clips: Float[Tensor, "batch time"], reconstructions: Float[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv:1811.02508, eq. 3), -50 to 100.

    With c the cosine between the two, it is c^2 / (1 - c^2); silence on either side gives -50.
    """
    x, y = clips.double(), reconstructions.double()
    energies = (x.square().sum(1) * y.square().sum(1)).clamp_min(1e-30)
    share = ((x * y).sum(1).square() / energies).clamp(1e-5, 1 - 1e-10)
    return 10 * torch.log10(share / (1 - share))


def stoi(clip: np.ndarray, reconstruction: np.ndarray, sample_rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al., 2011); None: too little speech."""
    if len(clip) < STOI_SECONDS * sample_rate:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(importlib.import_module("pystoi").stoi(clip, reconstruction, sample_rate))
        except RuntimeWarning:
            return None


def pesq(clip: np.ndarray, reconstruction: np.ndarray, sample_rate: int) -> float | None:
    """ITU-T P.862 at 8 kHz, P.862.2 in wide band at all other rates; None: no speech found.

    A reconstruction of zeros counts 1, the scale's lower end, because the package divides by its
    power.
    """
    if not reconstruction.any():
        return 1.0
    package = importlib.import_module("pesq")
    rate = NARROW_BAND if sample_rate == NARROW_BAND else WIDE_BAND
    pair = (resample(x, sample_rate, rate).astype(np.float32) for x in (clip, reconstruction))
    try:
        return float(package.pesq(rate, *pair, "nb" if rate == NARROW_BAND else "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None
