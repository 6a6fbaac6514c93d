"""SSIM is that of a library; LPIPS is its formula, from weights in files that are at hand, or named
where they are not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchmetrics.functional.image import structural_similarity_index_measure

from simvq_moe.models.image.losses import LPIPS, ImageLoss, vgg_file
from simvq_moe.models.image.ssim import ssim

LAYERS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
"""Channels of VGG16's convolutions, by their number in torchvision's model."""
COMPARED, POOLED = (2, 7, 14, 21, 28), (5, 10, 17, 24)


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """Random weights by torchvision's names."""
    torch.manual_seed(0)
    state = {}
    for number, (given, made) in LAYERS.items():
        scale = (2 / (9 * given)) ** 0.5
        state[f"features.{number}.weight"] = torch.randn(made, given, 3, 3) * scale
        state[f"features.{number}.bias"] = torch.randn(made) * 0.1
    return state


def pair(side: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, side, side) * 2 - 1, torch.rand(2, 3, side, side) * 2 - 1


def test_lpips_is_its_formula_with_the_heads_of_torchmetrics(
    vgg: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(vgg, tmp_path / "vgg.pth")
    lpips = LPIPS.load(tmp_path / "vgg.pth")
    a, b = (x.double() for x in pair())
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    xs = [(x - shift[:, None, None]) / scale[:, None, None] for x in (a, b)]
    expected = torch.zeros(2, dtype=torch.float64)
    for number in LAYERS:
        weight, bias = (vgg[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
        xs = [F.max_pool2d(x, 2) for x in xs] if number in POOLED else xs
        xs = [F.relu(F.conv2d(x, weight, bias, padding=1)) for x in xs]
        if number in COMPARED:
            head = getattr(lpips, f"head{COMPARED.index(number)}")[0, :, 0, 0].double()
            first, second = (x / x.norm(dim=1, keepdim=True) for x in xs)
            difference = ((first - second) ** 2 * head[:, None, None]).sum(1)
            expected += difference.mean(dim=(1, 2))
    # the floor of the norm
    assert_close(lpips(a, b), expected, rtol=1e-5, atol=0)
    assert float(expected.min()) > 0
    assert_close(lpips(a, a), torch.zeros(2, dtype=torch.float64))


def test_lpips_has_no_parameters_and_saves_nothing(vgg: dict[str, Tensor]) -> None:
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1)
        for i, n in enumerate((64, 128, 256, 512, 512))
    }
    lpips = LPIPS(vgg, heads)
    assert not list(lpips.parameters())
    assert not lpips.state_dict()
    a, b = pair()
    a.requires_grad_(True)
    loss, terms = ImageLoss({"mse": 0.0, "l1": 0.0, "ssim": 0.0, "lpips": 2.0}, lpips)(a, b)
    assert_close(loss, 2 * terms["lpips"])
    loss.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert float(a.grad.abs().sum()) > 0


def test_a_weight_without_the_network_is_refused() -> None:
    loss = ImageLoss({"mse": 1.0, "l1": 0.0, "ssim": 0.0, "lpips": 1.0})
    with pytest.raises(RuntimeError, match=r"lpips has weight 1\.0 and no vgg16"):
        loss(*pair())


def test_the_file_of_vgg16_is_the_named_one_or_torch_hubs() -> None:
    assert vgg_file("some/file.pth") == Path("some/file.pth")
    assert vgg_file(None).parent == Path(torch.hub.get_dir(), "checkpoints")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarity_and_its_gradient_are_those_of_torchmetrics_to_the_bit(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 7, 12, dtype=dtype) * 2 - 1
    near = (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)
    ours, theirs = near.clone().requires_grad_(), near.clone().requires_grad_()
    expected = structural_similarity_index_measure(theirs, images, data_range=2.0, reduction="none")
    found = ssim(ours, images, span=2.0)
    assert isinstance(expected, Tensor)
    assert torch.equal(found, expected)
    found.mean().backward()
    expected.mean().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
