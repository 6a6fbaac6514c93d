"""VQGAN's convolutional encoder and decoder (arXiv:2012.09841, table 7), with or without attention.

Built like the tokenizer of SimVQ's authors (arXiv:2411.02038): residual blocks of GroupNorm, SiLU
and 3x3 convolutions without biases, stride-2 convolutions down, sub-pixel convolutions up
(arXiv:1609.05158). `official_layout` loads the authors' weights into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 32
"""Groups of a GroupNorm, or as many of them as divide the channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of channels that need not be a multiple of 32."""
    return nn.GroupNorm(gcd(GROUPS, channels), channels, eps=1e-6)


class NormResidualBlock(nn.Module):
    """skip(x) + conv3(silu(norm(conv3(silu(norm(x)))))); skip is 1x1 where channels change."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if channels != out_channels:
            self.skip = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """x + attention of one head over all places of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Twice the height and width: a 3x3 convolution makes the four pixels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        return F.pixel_shuffle(self.conv(x), 2)


def _middle(channels: int, blocks: int, attention: bool) -> nn.Sequential:
    """The blocks at the lowest resolution, attention after the first of them."""
    layers: list[nn.Module] = [NormResidualBlock(channels, channels) for _ in range(blocks)]
    if attention:
        layers.insert(1, SpatialAttention(channels))
    return nn.Sequential(*layers)


class VQGANEncoder(nn.Module):
    """Images to features of hidden x the last multiplier channels, normalized and activated.

    Args:
        hidden: channels at the full resolution, before any multiplier.
        multipliers: of the channels at each resolution; between two of them height and width halve.
        residual_blocks: at each resolution, and once more at the lowest.
        attention: one attention layer at the lowest resolution.
    """

    def __init__(
        self, hidden: int, multipliers: Sequence[int], residual_blocks: int, *, attention: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, hidden, 3, padding=1, bias=False)]
        channels = hidden
        for i, multiplier in enumerate(multipliers):
            if i:
                layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
            for _ in range(residual_blocks):
                layers.append(NormResidualBlock(channels, hidden * multiplier))
                channels = hidden * multiplier
        self.channels = channels
        self.down = nn.Sequential(*layers)
        self.middle = _middle(channels, residual_blocks, attention)
        self.norm = group_norm(channels)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        return F.silu(self.norm(self.middle(self.down(images))))


class VQGANDecoder(nn.Module):
    """The encoder's mirror image: features of as many channels to images; same arguments."""

    def __init__(
        self, hidden: int, multipliers: Sequence[int], residual_blocks: int, *, attention: bool
    ) -> None:
        super().__init__()
        channels = hidden * multipliers[-1]
        self.middle = _middle(channels, residual_blocks, attention)
        layers: list[nn.Module] = []
        for i, multiplier in enumerate(reversed(multipliers)):
            if i:
                layers.append(Upsample(channels))
            for _ in range(residual_blocks):
                layers.append(NormResidualBlock(channels, hidden * multiplier))
                channels = hidden * multiplier
        self.up = nn.Sequential(*layers)
        self.norm = group_norm(channels)
        self.to_pixels = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return self.to_pixels(F.silu(self.norm(self.up(self.middle(features)))))
