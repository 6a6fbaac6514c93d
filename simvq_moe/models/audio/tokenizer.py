"""A convolutional audio tokenizer: encoder, quantizer, mirrored decoder on waveforms.

The shape is SEANet's as in SoundStream (arXiv:2107.03312, section III) and EnCodec
(arXiv:2210.13438): residual units of growing dilation, then a strided convolution that doubles the
channels. The activation is the Snake of DAC (arXiv:2306.06546, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil, prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from simvq_moe.models.audio.discriminators import Discriminators
from simvq_moe.models.audio.spectra import MelDistance, SpectralDistance
from simvq_moe.models.chunked import in_chunks, reach
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.quantizers import AnyQuantizer, Quantized


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned frequency a of each channel (arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(channels, 1))

    def forward(
        self, x: Float[Tensor, "batch channels time"]
    ) -> Float[Tensor, "batch channels time"]:
        # a small constant, because the frequency may pass through 0
        return x + (self.frequency * x).sin().square() / (self.frequency + 1e-9)


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the inner convolution dilated."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(
        self, x: Float[Tensor, "batch channels time"]
    ) -> Float[Tensor, "batch channels time"]:
        return x + self.layers(x)


class AudioTokenizer(Tokenizer):
    """Mono waveforms to ids of codes and back; a token covers the product of the strides.

    Args:
        quantizer: any quantizer; its width is that of the latents.
        sample_rate: Hz, which the mel bands of the loss need.
        hidden: channels of the first convolution; every stride doubles them.
        strides: of the strided convolutions, from the waveform on.
        dilations: of the residual units at every resolution.
        loss_windows: samples of a frame, for the spectral and mel terms of the loss.
        loss_weights: of the terms waveform (mean |x - x'|), spectral, mel, adversarial, feature.
        discriminators: who judges reconstructions; None: nobody.
        adversarial_start: forward passes in training before which they neither judge nor learn.
        mel: distance of mel bands; None: that of the loss windows.
    """

    forwards: Tensor

    def __init__(
        self,
        quantizer: AnyQuantizer,
        *,
        sample_rate: int,
        loss_windows: Sequence[int],
        loss_weights: Mapping[str, float],
        hidden: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        dilations: Sequence[int] = (1, 3, 9),
        discriminators: Discriminators | None = None,
        adversarial_start: int = 0,
        mel: MelDistance | None = None,
    ) -> None:
        super().__init__()
        self.hop = prod(strides)
        self.loss_weights = dict(loss_weights)
        down: list[nn.Module] = [nn.Conv1d(1, hidden, 7, padding=3)]
        up: list[nn.Module] = [nn.Conv1d(hidden, 1, 7, padding=3), Snake(hidden)]
        channels = hidden
        for stride in strides:
            edge = (2 * stride, stride, (stride + 1) // 2)
            down += [ResidualUnit(channels, dilation) for dilation in dilations]
            down += [Snake(channels), nn.Conv1d(channels, 2 * channels, *edge)]
            up += [ResidualUnit(channels, dilation) for dilation in reversed(dilations)]
            up.append(nn.ConvTranspose1d(2 * channels, channels, *edge, stride % 2))
            channels *= 2
            up.append(Snake(channels))
        self.encoder = nn.Sequential(*down, Snake(channels))
        self.decoder = nn.Sequential(*reversed(up))
        # last, so that a quantizer of another width leaves the random start of the rest alone
        self.to_latent = nn.Conv1d(channels, quantizer.width, 3, padding=1)
        self.from_latent = nn.Conv1d(quantizer.width, channels, 7, padding=3)
        self.quantizer = quantizer
        self.spectral = SpectralDistance(loss_windows)
        self.mel = mel or MelDistance(sample_rate, loss_windows)
        self.discriminators = discriminators
        self.adversarial_start = adversarial_start
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(
        self, audio: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch in [-1, 1], and its terms by name.

        With discriminators it holds their loss as well; no gradient of it leaves them, and none of
        the rest reaches them.
        """
        reconstruction, quantized = self.reconstruct(audio)
        audio = audio.to(reconstruction.dtype)
        terms = {
            "waveform": F.l1_loss(reconstruction, audio),
            "spectral": self.spectral(reconstruction, audio),
            "mel": self.mel(reconstruction, audio),
        }
        loss = quantized.loss
        if self.discriminators is not None:
            game, discriminator_loss = self._play(self.discriminators, audio, reconstruction)
            terms |= game
            loss = loss + discriminator_loss
        for name, term in terms.items():
            if name in self.loss_weights:
                loss = loss + self.loss_weights[name] * term
        terms |= quantized.losses
        return loss, {f"{name}_loss": term for name, term in terms.items()}

    def _play(
        self, discriminators: Discriminators, audio: Tensor, reconstruction: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The game's terms by name, and the loss of the discriminators; 0 before the start."""
        begun = int(self.forwards) >= self.adversarial_start
        if self.training:
            self.forwards += 1
        if not begun:
            zero = audio.new_zeros(())
            # a loss of every parameter, because data-parallel engines wait for all gradients
            idle = torch.stack([p.float().sum() for p in discriminators.parameters()]).sum() * 0
            return {"adversarial": zero, "feature": zero, "discriminator": zero}, idle
        weights = next(discriminators.parameters()).dtype
        game = discriminators.play(audio.to(weights), reconstruction.to(weights))
        return game._asdict(), game.discriminator

    def reconstruct(
        self, x: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch time"], Quantized]:
        reconstruction, quantized = super().reconstruct(x)
        return reconstruction[:, : x.shape[1]], quantized

    def latents(self, x: Float[Tensor, "batch time"]) -> Float[Tensor, "batch tokens channels"]:
        whole = F.pad(x, (0, -x.shape[1] % self.hop))  # silence fills the last token
        x = whole.to(self.to_latent.weight.dtype)[:, None]
        return self.to_latent(self.encoder(x)).movedim(1, -1)

    def samples(self, z: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch time"]:
        channels_first = z.to(self.from_latent.weight.dtype).movedim(-1, 1)
        waveform = self.decoder(self.from_latent(channels_first))[:, 0]
        return waveform.to(torch.promote_types(waveform.dtype, torch.float32))

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "batch time"], chunk: int | None = None
    ) -> Int[Tensor, "batch token *levels"]:
        """The ids of the codes of each recording.

        Args:
            chunk: tokens at a time, which bound the memory that a long recording takes; the ids are
                those of the whole. None: all at once.
        """
        if chunk is None:
            return super().encode(x)
        far = ceil(reach(self.encoder, Fraction(1, self.hop)) + reach(self.to_latent, 1))
        return in_chunks(super().encode, x, chunk=chunk, reach=far, read=self.hop)

    def decode(
        self, ids: Integer[Tensor, "batch token *levels"], chunk: int | None = None
    ) -> Float[Tensor, "batch time"]:
        """Recordings of ids, of whole tokens; for `chunk` see `encode`."""
        if chunk is None:
            return super().decode(ids)
        far = ceil(reach(nn.Sequential(self.from_latent, self.decoder), 1))
        return in_chunks(super().decode, ids, chunk=chunk, reach=far, written=self.hop)
