"""Spectrograms of several resolutions, and the distances between them that losses are made of.

Linear magnitudes: Engel et al., DDSP, arXiv:2001.04643, eq. 4. Mel: Kumar et al., DAC,
arXiv:2306.06546, section 3.3, whose windows and numbers of bands are the defaults here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.state import Stateful
from simvq_moe.hub import Pretrained

FLOOR = 1e-5
"""Magnitude below which a logarithm sees silence; full scale is 1."""
LINEAR_TO = 1_000.0
"""Hz up to which Slaney's mel scale is linear."""
Scale = Literal["slaney", "htk"]
Units = Literal["amplitude", "sum", "area"]


class Spectrogram(Stateful):
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
        self.hold("hann", partial(torch.hann_window, window))

    def forward(self, x: Float[Tensor, "batch time"]) -> Float[Tensor, "batch bins frames"]:
        return self.complex(x).abs()

    def complex(self, x: Float[Tensor, "batch time"]) -> Tensor:
        """The spectrum with its phases: (batch, bins, frames), complex."""
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


class MelDistance(Pretrained, Stateful):
    """Mean over windows of |log10 max(M, floor) - log10 max(M', floor)|, M the mel bands.

    Units matter at the floor alone: there is one for every band, in the magnitudes that others
    take the logarithm of.

    Args:
        sample_rate: Hz.
        windows: samples of a frame, at each resolution.
        bands: mel bands of each window; (): 5 for 32 samples to 320 for 2,048.
        scale: slaney (Auditory Toolbox, 1998): linear to 1 kHz, then logarithmic; htk: 2595 log10(1
            + f / 700).
        floor: below it there is silence.
        units: of the floor. amplitude: magnitudes over the window's sum, bands with a peak of 1;
            sum: magnitudes as torch.stft gives them (torchaudio's default); area: likewise, and
            bands over half their width in Hz (norm "slaney").
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int],
        *,
        bands: Sequence[int] = (),
        scale: Scale = "slaney",
        floor: float = FLOOR,
        units: Units = "amplitude",
    ) -> None:
        super().__init__()
        self.spectrograms = nn.ModuleList(Spectrogram(window) for window in windows)
        for window, count in zip(windows, bands or map(bands_of, windows), strict=True):
            shape = (sample_rate, window, count, scale)
            self.hold(f"filters_{window}", partial(mel_filters, *shape))
            self.hold(f"floors_{window}", partial(_floors, *shape, floor, units))

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
            filters = getattr(self, f"filters_{spectrogram.window}").to(x.dtype)
            floors = getattr(self, f"floors_{spectrogram.window}").to(x.dtype)
            a, b = ((filters @ spectrogram(z)).clamp(min=floors).log10() for z in (x, y))
            distances.append((a - b).abs().mean((1, 2)))
        return torch.stack(distances).mean(0)


def bands_of(window: int) -> int:
    """Mel bands of a window: 5 for 32 samples to 320 for 2,048."""
    return 5 * window // 32


class Corners(NamedTuple):
    """Hz at which each triangle begins, peaks and ends."""

    low: Float[Tensor, " bands"]
    centre: Float[Tensor, " bands"]
    high: Float[Tensor, " bands"]


def _corners(sample_rate: int, bands: int, scale: Scale) -> Corners:
    """Corners of triangles that overlap by half, from 0 Hz to half the sample rate."""
    top = torch.tensor(sample_rate / 2, dtype=torch.float64)
    places = torch.linspace(0, 1, bands + 2, dtype=torch.float64)
    if scale == "htk":
        hertz = 700 * (torch.exp(places * torch.log1p(top / 700)) - 1)
    else:
        step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
        # in units of 200/3 Hz
        break_point = LINEAR_TO * 3 / 200
        highest = torch.where(
            top < LINEAR_TO, top * 3 / 200, break_point + torch.log(top / LINEAR_TO) / step
        )
        mels = places * highest
        above = LINEAR_TO * torch.exp((mels - break_point) * step)
        hertz = torch.where(mels < break_point, mels * 200 / 3, above)
    return Corners(hertz[:-2], hertz[1:-1], hertz[2:])


def mel_filters(
    sample_rate: int, window: int, bands: int, scale: Scale = "slaney"
) -> Float[Tensor, "bands bins"]:
    """Triangles that overlap by half, from 0 Hz to half the sample rate, with a peak of 1."""
    low, centre, high = (corner[:, None] for corner in _corners(sample_rate, bands, scale))
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0).float()


def _floors(
    sample_rate: int, window: int, bands: int, scale: Scale, floor: float, units: Units
) -> Float[Tensor, "bands 1"]:
    """The least of every band, in magnitudes over the window's sum, see `MelDistance`."""
    corners = _corners(sample_rate, bands, scale)
    unit = torch.ones(bands, dtype=torch.float64)
    if units != "amplitude":
        unit = unit * torch.hann_window(window, dtype=torch.float64).sum()
    if units == "area":
        unit = unit * 2 / (corners.high - corners.low)
    return (floor / unit).float()[:, None]
