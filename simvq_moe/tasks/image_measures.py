"""How well images survive: squared error, PSNR, SSIM, and on demand LPIPS and rFID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from simvq_moe.config.schema import ImageTokenizerConfig
from simvq_moe.errors import ConfigError
from simvq_moe.models.image.losses import LPIPS, vgg_file
from simvq_moe.models.image.ssim import ssim

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of torch-fidelity's InceptionV3 weights, which it downloads where there is a network."""


class ImageMeasures(nn.Module):
    """Sums over held-out images, and the means of summed sums.

    PSNR is that of each image over RGB. LPIPS is that of VGG16. rFID is the Frechet distance
    (arXiv:1706.08500) of reconstructions to originals; its moments are kept here, so that all
    images must pass through one object in one process.

    Args:
        lpips: the network of LPIPS; None: it is not measured.
        fid: torchmetrics' FrechetInceptionDistance; None: it is not measured.
    """

    def __init__(self, lpips: LPIPS | None = None, fid: nn.Module | None = None) -> None:
        super().__init__()
        self.lpips, self.fid = lpips, fid

    def sums(
        self,
        images: Float[Tensor, "batch 3 height width"],
        reconstructions: Float[Tensor, "batch 3 height width"],
    ) -> dict[str, Tensor]:
        """Each measure summed over images in [-1, 1], and their number.

        All are of what is seen: values beyond black and white are cut off, as where pictures are
        written.
        """
        images, reconstructions = images.clamp(-1, 1), reconstructions.clamp(-1, 1)
        error = (reconstructions - images).double().square().mean(dim=(1, 2, 3))
        # the pixels span 2, from -1 to 1
        values = {"mse": error, "psnr": 10 * torch.log10(4 / error.clamp_min(1e-10))}
        values["ssim"] = error
        if len(images):  # a rank may have none left
            values["ssim"] = ssim(reconstructions, images, span=2.0).double()
        if self.lpips is not None:
            values["lpips"] = self.lpips(reconstructions, images).double()
        if self.fid is not None:
            for pixels, real in ((images, True), (reconstructions, False)):
                self.fid.update(as_bytes(pixels), real=real)  # pyright: ignore[reportCallIssue]
        sums = {name: value.sum() for name, value in values.items()}
        return sums | {"images": torch.tensor(float(len(images)))}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`val/<measure>` of each measure."""
        names = [name for name in sums if name != "images"]
        means = {f"val/{name}": sums[name] / sums["images"] for name in names}
        if self.fid is not None:
            means["val/rfid"] = float(self.fid.compute())  # pyright: ignore[reportCallIssue]
        return means


def optional_measures(config: ImageTokenizerConfig, names: Sequence[str]) -> ImageMeasures:
    """The measures with those asked for.

    Args:
        config: says where the weights of LPIPS are.
        names: "lpips", "rfid".

    Raises:
        ConfigError: a package or a file of weights is missing.
    """
    network, fid = None, None
    if "lpips" in names:
        file = vgg_file(config.lpips_file)
        if not file.is_file():
            raise ConfigError(f"--lpips: {missing_vgg(config)}, or drop --lpips")
        network = LPIPS.load(file)
    if "rfid" in names:
        if not find_spec("torch_fidelity"):
            raise ConfigError("--rfid needs torch-fidelity: pip install 'simvq-moe[fid]'")
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            fid = FrechetInceptionDistance(feature=2048)
        except (OSError, ImportError) as error:
            raise ConfigError(
                f"--rfid: {' '.join(str(error).split())}: put {INCEPTION_FILE} of torch-fidelity's "
                f"releases into {torch.hub.get_dir()}/checkpoints, or drop --rfid"
            ) from None
    return ImageMeasures(network, fid)


def missing_vgg(config: ImageTokenizerConfig) -> str:
    """What to say where the weights of LPIPS are not at hand."""
    file = vgg_file(config.lpips_file)
    return f"{file} is missing: put torchvision's ImageNet weights of VGG16 there"


def as_bytes(
    images: Float[Tensor, "*batch 3 height width"],
) -> UInt8[Tensor, "*batch 3 height width"]:
    """Pixels in [-1, 1] as 0 to 255; what lies outside is cut off."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
