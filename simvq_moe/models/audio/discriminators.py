"""Discriminators of recordings: periods of the waveform, and resolutions of its spectrum.

The least-squares game with feature matching is that of HiFi-GAN (arXiv:2010.05646, eqs. 3 to 8);
complex spectrograms as images: EnCodec (arXiv:2210.13438, section 3.4); both together: DAC
(arXiv:2306.06546, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from simvq_moe.hub import Pretrained
from simvq_moe.models.audio.spectra import Spectrogram

SLOPE = 0.1
"""Slope of the leaky ReLU below 0."""


class Game(NamedTuple):
    """What a batch of recordings and their reconstructions cost either player."""

    adversarial: Float[Tensor, ""]
    """What the verdict costs the reconstructions: mean (1 - D(x'))^2."""
    feature: Float[Tensor, ""]
    """What unlike activations cost the reconstructions: mean |D_l(x) - D_l(x')| over layers l."""
    discriminator: Float[Tensor, ""]
    """The loss of the discriminators: mean (1 - D(x))^2 + D(x')^2."""


class Stack(nn.Module):
    """2-d convolutions, all of whose activations count: the last is the map of scores."""

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = _features(self.layers[:-1], x)
        return [*features, self.layers[-1](features[-1])]


def _features(layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """The activations of every layer."""
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return features


class PeriodDiscriminator(nn.Module):
    """Sees samples that lie whole periods apart, in columns of an image of `period` columns."""

    def __init__(self, period: int, hidden: int) -> None:
        super().__init__()
        self.period = period
        channels = [1, hidden, 4 * hidden, 16 * hidden, 32 * hidden]
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)) for a, b in pairwise(channels)]
        layers.append(nn.Conv2d(32 * hidden, 32 * hidden, (5, 1), padding=(2, 0)))
        layers.append(nn.Conv2d(32 * hidden, 1, (3, 1), padding=(1, 0)))
        self.stack = Stack(layers)

    def forward(self, x: Float[Tensor, "batch time"]) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[1] % self.period))
        return self.stack(x.unflatten(1, (-1, self.period))[:, None])


class SpectrumDiscriminator(nn.Module):
    """Sees real and imaginary part of a spectrogram, in frames of `window` samples.

    Args:
        window: samples of a frame.
        hidden: channels.
        borders: between frequency bands, as shares of half the sample rate. Each band has layers of
            its own, and one layer scores them side by side (DAC's multi-band discriminator).
    """

    def __init__(self, window: int, hidden: int, borders: Sequence[float] = ()) -> None:
        super().__init__()
        self.spectrogram = Spectrogram(window)
        bins = window // 2 + 1
        edges = [0, *(int(border * bins) for border in borders), bins]
        self.sizes = [b - a for a, b in pairwise(edges)]
        stacks = [self._layers(hidden) for _ in self.sizes]
        score = nn.Conv2d(hidden, 1, 3, padding=1)
        if borders:
            self.bands = nn.ModuleList(nn.ModuleList(map(weight_norm, stack)) for stack in stacks)
            self.score = weight_norm(score)
        else:
            self.stack = Stack([*stacks[0], score])

    def _layers(self, hidden: int) -> list[nn.Conv2d]:
        layers = [nn.Conv2d(2, hidden, (9, 3), padding=(4, 1))]
        for dilation in (1, 2, 4):
            layers.append(
                nn.Conv2d(
                    hidden,
                    hidden,
                    kernel_size=(9, 3),
                    stride=(2, 1),
                    dilation=(1, dilation),
                    padding=(4, dilation),
                )
            )
        return [*layers, nn.Conv2d(hidden, hidden, 3, padding=1)]

    def forward(self, x: Float[Tensor, "batch time"]) -> list[Tensor]:
        dtype = x.dtype
        spectrum = torch.view_as_real(self.spectrogram.complex(x.float()))
        image = spectrum.movedim(-1, 1).to(dtype)
        if len(self.sizes) == 1:
            return self.stack(image)
        features, last = [], []
        for band, layers in zip(image.split(self.sizes, dim=2), self.bands, strict=True):
            assert isinstance(layers, nn.ModuleList)
            of_band = _features(layers, band)
            features += of_band
            last.append(of_band[-1])
        return [*features, self.score(torch.cat(last, dim=2))]


class Discriminators(Pretrained):
    """Several discriminators that see the same recordings.

    Args:
        periods: samples; one discriminator each, primes so that they see different things.
        windows: samples of a frame; one discriminator each.
        hidden: channels of the first layers.
        borders: between frequency bands, see `SpectrumDiscriminator`.
    """

    def __init__(
        self,
        periods: Sequence[int],
        windows: Sequence[int],
        hidden: int,
        borders: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            [PeriodDiscriminator(period, hidden) for period in periods]
            + [SpectrumDiscriminator(window, hidden, borders) for window in windows]
        )

    def forward(self, x: Float[Tensor, "batch time"]) -> list[list[Tensor]]:
        """Activations of each discriminator's layers; the last ones are its scores."""
        return [member(x) for member in self.members]

    def play(
        self, recordings: Float[Tensor, "batch time"], reconstructions: Float[Tensor, "batch time"]
    ) -> Game:
        """The losses of both players, whose gradients each reach that player alone.

        One backward pass of their sum is then a step of both at once, for which one optimizer is
        enough.
        """
        real, fake = self(recordings), self(reconstructions.detach())
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        judged = functional_call(self, fixed, (reconstructions,))
        adversarial = [(1 - member[-1].float()).square().mean() for member in judged]
        feature = [
            F.l1_loss(b.float(), a.detach().float())
            for of_real, of_fake in zip(real, judged, strict=True)
            for a, b in zip(of_real[:-1], of_fake[:-1], strict=True)
        ]
        discriminator = [
            (1 - a[-1].float()).square().mean() + b[-1].float().square().mean()
            for a, b in zip(real, fake, strict=True)
        ]
        terms = (adversarial, feature, discriminator)
        return Game(*(torch.stack(term).mean() for term in terms))
