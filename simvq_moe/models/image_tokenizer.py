"""A convolutional image tokenizer: encoder, quantizer, mirrored decoder (VQ-VAE, arXiv:1711.00937).

Loss: mean squared error on pixels in [-1, 1] plus the quantizer's own loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.quantizers import AnyQuantizer, Quantized


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return x + self.layers(x)


class ImageTokenizer(nn.Module):
    """Images to ids of codes and back; a token covers 2^downsamplings pixels a side.

    Args:
        quantizer: any quantizer; its width is that of the latents.
        hidden: channels of the convolutions.
        downsamplings: number of stride-2 convolutions.
        residual_blocks: residual blocks at the lowest resolution, on either side.
    """

    def __init__(
        self,
        quantizer: AnyQuantizer,
        *,
        hidden: int = 32,
        downsamplings: int = 2,
        residual_blocks: int = 1,
    ) -> None:
        super().__init__()
        down: list[nn.Module] = []
        for channels in [3] + [hidden] * (downsamplings - 1) if downsamplings else []:
            down += [nn.Conv2d(channels, hidden, 4, stride=2, padding=1), nn.ReLU()]
        up: list[nn.Module] = []
        for channels in [hidden] * (downsamplings - 1) + [3] if downsamplings else []:
            up += [nn.ReLU(), nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1)]
        ends = (nn.Identity(), nn.Identity())
        if not downsamplings:
            ends = (nn.Conv2d(3, hidden, 1), nn.Conv2d(hidden, 3, 1))
        self.encoder = nn.Sequential(
            *down, ends[0], *(ResidualBlock(hidden) for _ in range(residual_blocks)), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            *(ResidualBlock(hidden) for _ in range(residual_blocks)), *up, ends[1]
        )
        # last, so that a quantizer of another width leaves the random start of the rest alone
        self.to_latent = nn.Conv2d(hidden, quantizer.width, 1)
        self.from_latent = nn.Conv2d(quantizer.width, hidden, 1)
        self.quantizer = quantizer

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch in [-1, 1], and its terms by name."""
        reconstruction, quantized = self.reconstruct(images)
        mse = F.mse_loss(reconstruction, images)
        terms = {f"{name}_loss": term for name, term in quantized.losses.items()}
        return mse + quantized.loss, {"mse": mse, **terms}

    def reconstruct(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Quantized]:
        """Images through the codebook and back, and what the quantizer returned."""
        quantized = self.quantizer(self._latents(images))
        return self._pixels(quantized.z_q), quantized

    def initialize(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Start the quantizer from these images, if its start needs data; see its own method."""
        if self.quantizer.waits_for_data:
            self.quantizer.initialize(self._latents(images))

    def encode(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch rows columns *levels"]:
        """The ids of the codes of each image."""
        return self.quantizer.encode(self._latents(images))

    def decode(
        self, ids: Int[Tensor, "batch rows columns *levels"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images of ids."""
        return self._pixels(self.quantizer.decode(ids))

    def _latents(self, images: Tensor) -> Tensor:
        return self.to_latent(self.encoder(images.to(self.to_latent.weight.dtype))).movedim(1, -1)

    def _pixels(self, latents: Tensor) -> Tensor:
        channels_first = latents.to(self.from_latent.weight.dtype).movedim(-1, 1)
        pixels = self.decoder(self.from_latent(channels_first))
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
