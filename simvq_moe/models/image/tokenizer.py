"""A convolutional image tokenizer: encoder, quantizer, mirrored decoder.

"small" is VQ-VAE's (arXiv:1711.00937), "vqgan" VQGAN's (arXiv:2012.09841). Loss: mean squared error
on pixels in [-1, 1] or other distances of images, the quantizer's own loss, and, with a
discriminator, the losses of both players.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.choices import check_choice
from simvq_moe.models.image.discriminator import PatchDiscriminator, adaptive_weight
from simvq_moe.models.image.losses import LPIPS, ImageLoss
from simvq_moe.models.image.vqgan import VQGANDecoder, VQGANEncoder
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.quantizers import AnyQuantizer

Architecture = Literal["small", "vqgan"]

TERMS = ("mse", "l1", "ssim", "lpips", "adversarial")
"""Terms of the loss, beside the quantizer's."""


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


class ImageTokenizer(Tokenizer):
    """Images to ids of codes and back; a token covers 2^downsamplings pixels a side.

    Args:
        quantizer: any quantizer; its width is that of the latents.
        architecture: "small": strided convolutions of equal width and residual blocks at the lowest
            resolution; "vqgan": residual blocks with GroupNorm at every resolution.
        hidden: channels of the convolutions, at the full resolution.
        downsamplings: number of stride-2 convolutions.
        residual_blocks: residual blocks at the lowest resolution, on either side; vqgan: at every
            resolution, and once more at the lowest.
        channel_multipliers: vqgan: factors on hidden at each resolution, one more than
            downsamplings; (): all 1.
        attention: vqgan: an attention layer at the lowest resolution, on either side.
        loss_weights: of the terms mse, l1, ssim, lpips and adversarial, 0 where they are missing;
            None: mse alone.
        lpips: the network of the term lpips.
        discriminator: who judges reconstructions; None: nobody.
        adaptive: multiply the adversarial weight by `adaptive_weight`.
        adversarial_start: forward passes in training before which it neither judges nor learns.
    """

    forwards: Tensor

    def __init__(
        self,
        quantizer: AnyQuantizer,
        *,
        architecture: Architecture = "small",
        hidden: int = 32,
        downsamplings: int = 2,
        residual_blocks: int = 1,
        channel_multipliers: Sequence[int] = (),
        attention: bool = False,
        loss_weights: Mapping[str, float] | None = None,
        lpips: LPIPS | None = None,
        discriminator: PatchDiscriminator | None = None,
        adaptive: bool = False,
        adversarial_start: int = 0,
    ) -> None:
        super().__init__()
        check_choice("architecture", architecture, Architecture)
        if architecture == "small":
            self.encoder, self.decoder = _small(hidden, downsamplings, residual_blocks)
            channels, from_latent_size = hidden, 1
        else:
            multipliers = tuple(channel_multipliers) or (1,) * (downsamplings + 1)
            shape = (hidden, multipliers, residual_blocks)
            self.encoder = VQGANEncoder(*shape, attention=attention)
            self.decoder = VQGANDecoder(*shape, attention=attention)
            channels, from_latent_size = hidden * multipliers[-1], 3
        # last, so that a quantizer of another width leaves the random start of the rest alone
        self.to_latent = nn.Conv2d(channels, quantizer.width, 1)
        size, padding = from_latent_size, from_latent_size // 2
        self.from_latent = nn.Conv2d(quantizer.width, channels, size, padding=padding)
        self.quantizer = quantizer
        weights: dict[str, float] = dict.fromkeys(TERMS, 0.0)
        weights.update({"mse": 1.0} if loss_weights is None else loss_weights)
        self.adversarial_weight = weights.pop("adversarial")
        self.distance = ImageLoss(weights, lpips)
        self.discriminator = discriminator
        self.adaptive = adaptive
        self.adversarial_start = adversarial_start
        if discriminator is not None:
            self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch in [-1, 1], and its terms by name.

        With a discriminator it holds that one's loss as well; no gradient of it leaves the
        discriminator, and none of the rest reaches it.
        """
        reconstruction, quantized = self.reconstruct(images)
        distance, terms = self.distance(reconstruction, images.to(reconstruction.dtype))
        loss = distance + quantized.loss
        if self.discriminator is not None:
            game_loss, game = self._play(self.discriminator, images, reconstruction, distance)
            loss, terms = loss + game_loss, terms | game
        terms |= {f"{name}_loss": term for name, term in quantized.losses.items()}
        return loss, terms

    def _play(
        self,
        discriminator: PatchDiscriminator,
        images: Tensor,
        reconstruction: Tensor,
        distance: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the game adds to the loss, and its terms by name; 0 before the start."""
        begun = int(self.forwards) >= self.adversarial_start
        if self.training:
            self.forwards += 1
        names = ("adversarial_loss", "discriminator_loss", "adversarial_weight")
        if not begun:
            # a loss of every parameter, because data-parallel engines wait for all gradients
            idle = torch.stack([p.float().sum() for p in discriminator.parameters()]).sum() * 0
            return idle, dict.fromkeys(names, images.new_zeros(()))
        dtype = next(discriminator.parameters()).dtype
        game = discriminator.play(images.to(dtype), reconstruction.to(dtype))
        weight = torch.full_like(distance, self.adversarial_weight).detach()
        if self.adaptive:
            weight = weight * adaptive_weight(distance, game.adversarial, self._last_layer())
        terms = (game.adversarial, game.discriminator, weight)
        loss = weight * game.adversarial + game.discriminator
        return loss, dict(zip(names, terms, strict=True))

    def _last_layer(self) -> Tensor:
        """Weights of the decoder's last convolution."""
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        return [m.weight for m in self.decoder.modules() if isinstance(m, kinds)][-1]

    def latents(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        return self.to_latent(self.encoder(x.to(self.to_latent.weight.dtype))).movedim(1, -1)

    def samples(
        self, z: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch 3 height width"]:
        channels_first = z.to(self.from_latent.weight.dtype).movedim(-1, 1)
        pixels = self.decoder(self.from_latent(channels_first))
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def _small(
    hidden: int, downsamplings: int, residual_blocks: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder with residual blocks at the lowest resolution alone."""
    down: list[nn.Module] = []
    for channels in [3] + [hidden] * (downsamplings - 1) if downsamplings else []:
        down += [nn.Conv2d(channels, hidden, 4, stride=2, padding=1), nn.ReLU()]
    up: list[nn.Module] = []
    for channels in [hidden] * (downsamplings - 1) + [3] if downsamplings else []:
        up += [nn.ReLU(), nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1)]
    ends = (nn.Identity(), nn.Identity())
    if not downsamplings:
        ends = (nn.Conv2d(3, hidden, 1), nn.Conv2d(hidden, 3, 1))
    encoder = nn.Sequential(
        *down, ends[0], *(ResidualBlock(hidden) for _ in range(residual_blocks)), nn.ReLU()
    )
    decoder = nn.Sequential(*(ResidualBlock(hidden) for _ in range(residual_blocks)), *up, ends[1])
    return encoder, decoder
