"""Structural similarity of images (Wang et al., IEEE Trans. Image Processing 13(4), 2004).

With the sizes of the paper: a Gaussian window of standard deviation 1.5, which reflects at edges,
K1 = 0.01 and K2 = 0.03. It is torchmetrics' to the bit, whose import takes longer than torch's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

DEVIATION = 1.5
"""Standard deviation of the window in pixels."""
REACH = 5
"""Pixels from the window's centre to its edge."""


def ssim(
    a: Float[Tensor, "batch channels height width"],
    b: Float[Tensor, "batch channels height width"],
    span: float,
) -> Float[Tensor, " batch"]:
    """The mean over windows and channels for each pair of images, at least 6 pixels a side.

    Args:
        span: distance from the darkest to the brightest value that a pixel can have.
    """
    images, channels = a.shape[:2]
    edges = (REACH,) * 4
    a, b = F.pad(a, edges, mode="reflect"), F.pad(b, edges, mode="reflect")
    window = _window(a).expand(channels, 1, -1, -1)
    means = F.conv2d(torch.cat((a, b, a * a, b * b, a * b)), window, groups=channels)
    mean_a, mean_b, square_a, square_b, product = means.split(images)
    # each product of means once: gradients add up in the order in which values are used
    bright_a, bright_b, bright = mean_a.pow(2), mean_b.pow(2), mean_a * mean_b
    variance_a = (square_a - bright_a).clamp(min=0.0)
    variance_b = (square_b - bright_b).clamp(min=0.0)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    contrast = 2 * (product - bright) + c2
    contrast_below = (variance_a + variance_b) + c2
    above = (2 * bright + c1) * contrast
    below = (bright_a + bright_b + c1) * contrast_below
    return (above / below).reshape(images, -1).mean(-1)


def _window(like: Tensor) -> Float[Tensor, "side side"]:
    distance = torch.arange(-REACH, REACH + 1, dtype=like.dtype, device=like.device)
    line = torch.exp(-torch.pow(distance / DEVIATION, 2) / 2)
    line = (line / line.sum())[None]
    return line.T @ line
