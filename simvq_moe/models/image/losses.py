"""Distances of images in the loss: absolute and squared error, SSIM, and LPIPS.

LPIPS (arXiv:1801.03924, eq. 1) compares the activations of a VGG16 for photographs. Its heads are
those that torchmetrics ships; the VGG16 is torchvision's file of weights, half a gigabyte, which is
not downloaded: put it where `vgg_file` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.models.image.ssim import ssim

VGG_FILE = "vgg16-397923af.pth"
"""Name of torchvision's ImageNet weights of VGG16."""
VGG_BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions of VGG16 at each resolution."""
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS takes this mean off the channels of images in [-1, 1] and divides by this deviation."""


def vgg_file(named: str | None) -> Path:
    """The file of VGG16's weights: the named one, or torch.hub's place for it."""
    return Path(named) if named else Path(torch.hub.get_dir(), "checkpoints", VGG_FILE)


class LPIPS(nn.Module):
    """Mean squared difference of normalized activations, weighted by learned heads.

    The weights are buffers outside of the state dict: they are neither trained nor saved.

    Args:
        vgg: state dict of torchvision's VGG16.
        heads: weights of the five heads, by torchmetrics' names.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        layer = 0
        self.layers: list[list[str]] = []
        for i, block in enumerate(VGG_BLOCKS):
            names = []
            for _ in range(block):
                names.append(f"conv{layer}")
                for part in ("weight", "bias"):
                    self._keep(f"{names[-1]}_{part}", vgg[f"features.{layer}.{part}"])
                layer += 2  # a ReLU lies between
            layer += 1  # and a pooling layer between blocks
            self.layers.append(names)
            self._keep(f"head{i}", heads[f"lin{i}.model.1.weight"])
        self._keep("mean", torch.tensor(MEAN)[:, None, None])
        self._keep("deviation", torch.tensor(DEVIATION)[:, None, None])

    @classmethod
    def load(cls, file: Path) -> LPIPS:
        """Load VGG16's weights from a file, and the heads that come with torchmetrics."""
        spec = find_spec("torchmetrics")
        if spec is None:
            raise ModuleNotFoundError("no module torchmetrics", name="torchmetrics")
        assert spec.submodule_search_locations is not None
        root = Path(spec.submodule_search_locations[0])
        heads = root / "functional" / "image" / "lpips_models" / "vgg.pth"
        vgg, linear = (
            torch.load(path, map_location="cpu", weights_only=True) for path in (file, heads)
        )
        return cls(vgg, linear)

    def forward(
        self,
        a: Float[Tensor, "batch 3 height width"],
        b: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """The distance of each pair of images in [-1, 1], at least 16 pixels a side."""
        features = zip(self._features(a), self._features(b), strict=True)
        distances = [
            F.conv2d((x - y).square(), getattr(self, f"head{i}").to(x.dtype)).mean(dim=(1, 2, 3))
            for i, (x, y) in enumerate(features)
        ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (images - self.mean.to(images.dtype)) / self.deviation.to(images.dtype)
        found = []
        for i, names in enumerate(self.layers):
            x = F.max_pool2d(x, 2) if i else x
            for name in names:
                weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
                x = F.relu(F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1))
            # the floor lies inside the root, whose gradient at 0 is infinite
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.detach().clone(), persistent=False)


class ImageLoss(nn.Module):
    """Weighted sum of distances between images and their reconstructions.

    Args:
        weights: of mse, l1, ssim (1 - SSIM) and lpips; a term of weight 0 is not computed, but mse
            is always reported.
        lpips: what computes lpips; None: its term can't be computed here.
    """

    def __init__(self, weights: Mapping[str, float], lpips: LPIPS | None = None) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.lpips = lpips

    def forward(
        self,
        reconstruction: Float[Tensor, "batch 3 height width"],
        images: Float[Tensor, "batch 3 height width"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The sum and its terms by name.

        Raises:
            RuntimeError: lpips has a weight and its network is not at hand.
        """
        terms = {"mse": F.mse_loss(reconstruction, images)}
        if self.weights["l1"]:
            terms["l1"] = F.l1_loss(reconstruction, images)
        if self.weights["ssim"]:
            terms["ssim"] = 1 - ssim(reconstruction, images, span=2.0).mean()
        if self.weights["lpips"]:
            if self.lpips is None:
                raise RuntimeError(f"lpips has weight {self.weights['lpips']} and no {VGG_FILE}")
            terms["lpips"] = self.lpips(reconstruction, images).mean()
        loss = self.weights["mse"] * terms["mse"]
        for name in ("l1", "ssim", "lpips"):
            if name in terms:
                loss = loss + self.weights[name] * terms[name]
        return loss, terms
