"""Spectrograms of several resolutions, and the distances between them that losses are made of.

Linear magnitudes: Engel et al., DDSP, arXiv:2001.04643, eq. 4. Mel: Kumar et al., DAC,
arXiv:2306.06546, section 3.3, whose windows and numbers of bands are the defaults here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FLOOR = 1e-5
"""Magnitude below which a logarithm sees silence; full scale is 1."""
LINEAR_TO = 1_000.0
"""Hz up to which the mel scale is linear."""


class Spectrogram(nn.Module):
    """Magnitudes of a Hann-windowed Fourier transform every quarter window, over the window's sum.

    A sine of amplitude 1 has a peak of 1/2. The signal continues as silence at both ends.

    Args:
        window: samples of a frame.
    """

    hann: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        # not in checkpoints: a function of the config
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def forward(self, x: Float[Tensor, "batch time"]) -> Float[Tensor, "batch bins frames"]:
        return self.complex(x).abs()

    def complex(self, x: Float[Tensor, "batch time"]) -> Tensor:
        """With phases: (batch, bins, frames), complex."""
        hann = self.hann.to(x.dtype)
        spectrum = torch.stft(
            x,
            n_fft=self.window,
            hop_length=self.window // 4,
            window=hann,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum / hann.sum()


class SpectralDistance(nn.Module):
    """Mean over windows of |S - S'| + |ln S - ln S'|, S the magnitudes."""

    def __init__(self, windows: Sequence[int]) -> None:
        super().__init__()
        self.spectrograms = nn.ModuleList(Spectrogram(window) for window in windows)

    def forward(
        self, x: Float[Tensor, "batch time"], y: Float[Tensor, "batch time"]
    ) -> Float[Tensor, ""]:
        distances = []
        for spectrogram in self.spectrograms:
            a, b = spectrogram(x), spectrogram(y)
            linear = F.l1_loss(a, b)
            distances.append(linear + F.l1_loss(a.clamp_min(FLOOR).log(), b.clamp_min(FLOOR).log()))
        return torch.stack(distances).mean()


class MelDistance(nn.Module):
    """Mean over windows of |log10 M - log10 M'|, M the magnitudes of mel bands.

    Args:
        sample_rate: Hz.
        windows: samples of a frame, at each resolution.
    """

    def __init__(self, sample_rate: int, windows: Sequence[int]) -> None:
        super().__init__()
        self.spectrograms = nn.ModuleList(Spectrogram(window) for window in windows)
        for window in windows:
            filters = mel_filters(sample_rate, window, bands_of(window))
            self.register_buffer(f"filters_{window}", filters, persistent=False)

    def forward(
        self, x: Float[Tensor, "batch time"], y: Float[Tensor, "batch time"]
    ) -> Float[Tensor, ""]:
        return self.of_each(x, y).mean()

    def of_each(
        self, x: Float[Tensor, "batch time"], y: Float[Tensor, "batch time"]
    ) -> Float[Tensor, " batch"]:
        """The distance of each pair."""
        distances = []
        for spectrogram in self.spectrograms:
            assert isinstance(spectrogram, Spectrogram)
            filters = self.get_buffer(f"filters_{spectrogram.window}").to(x.dtype)
            a, b = ((filters @ spectrogram(z)).clamp_min(FLOOR).log10() for z in (x, y))
            distances.append((a - b).abs().mean((1, 2)))
        return torch.stack(distances).mean(0)


def bands_of(window: int) -> int:
    """Mel bands of a window: 5 for 32 samples to 320 for 2,048."""
    return 5 * window // 32


def mel_filters(sample_rate: int, window: int, bands: int) -> Float[Tensor, "bands bins"]:
    """Triangles that overlap by half, from 0 Hz to half the sample rate, with a peak of 1.

    On the scale of Slaney's Auditory Toolbox (1998): linear to 1 kHz, then logarithmic.
    """
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
    top = torch.tensor(sample_rate / 2, dtype=torch.float64)
    # in units of 200/3 Hz
    break_point = LINEAR_TO * 3 / 200
    highest = torch.where(
        top < LINEAR_TO, top * 3 / 200, break_point + torch.log(top / LINEAR_TO) / step
    )
    mels = torch.linspace(0, 1, bands + 2, dtype=torch.float64) * highest
    above = LINEAR_TO * torch.exp((mels - break_point) * step)
    corners = torch.where(mels < break_point, mels * 200 / 3, above)
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0).float()
