"""PatchGAN: a convolutional discriminator of overlapping patches, and VQGAN's game with it.

The discriminator is pix2pix's (arXiv:1611.07004, appendix 6.1.2), with GroupNorm in place of
BatchNorm, so that a rank's verdict does not depend on what the batch of another rank holds. The
hinge loss and the adaptive weight are VQGAN's (arXiv:2012.09841, eqs. 6 and 7), the LeCam term is
that of arXiv:2104.03310.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from simvq_moe.core.choices import check_choice
from simvq_moe.core.collectives import total
from simvq_moe.core.running_mean import RunningMean
from simvq_moe.hub import Pretrained
from simvq_moe.models.image.vqgan import group_norm

SLOPE = 0.2
"""Slope of the leaky ReLU below 0."""
DELTA, LARGEST_WEIGHT = 1e-4, 1e4
"""Added to the denominator of the adaptive weight, and its upper bound."""

GeneratorLoss = Literal["hinge", "non_saturating"]


class Game(NamedTuple):
    """What a batch of images and their reconstructions cost either player."""

    adversarial: Float[Tensor, ""]
    """What the verdict costs the reconstructions."""
    discriminator: Float[Tensor, ""]
    """The loss of the discriminator: half the mean of relu(1 - D(x)) + relu(1 + D(x')), and its
    LeCam term."""


class PatchDiscriminator(Pretrained):
    """A map of scores; each sees a patch, of 70 pixels a side with three layers.

    Args:
        hidden: channels of the first layer; every further one doubles them, up to eightfold.
        layers: of stride 2; two of stride 1 follow.
        generator_loss: of the reconstructions: hinge is mean -D(x'); non_saturating is
            softplus(-D(x')) of the mean score of each image, as the code of SimVQ's authors has it.
        lecam: weight of the LeCam term in the discriminator's loss; 0: there is none.
    """

    def __init__(
        self, hidden: int, layers: int, generator_loss: GeneratorLoss, lecam: float = 0.0
    ) -> None:
        super().__init__()
        check_choice("generator_loss", generator_loss, GeneratorLoss)
        self.generator_loss: GeneratorLoss = generator_loss
        self.lecam = LeCam(lecam) if lecam else None
        stack: list[nn.Module] = [
            nn.Conv2d(3, hidden, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        ]
        channels = hidden
        for i in range(1, layers + 1):
            wider = hidden * min(2**i, 8)
            stride = 2 if i < layers else 1
            stack.append(nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False))
            stack += [group_norm(wider), nn.LeakyReLU(SLOPE)]
            channels = wider
        stack.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.stack = nn.Sequential(*stack)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        return self.stack(images)

    def play(
        self,
        images: Float[Tensor, "batch 3 height width"],
        reconstructions: Float[Tensor, "batch 3 height width"],
    ) -> Game:
        """The losses of both players, whose gradients each reach that player alone.

        One backward pass of their sum is then a step of both at once, for which one optimizer and
        one engine are enough.
        """
        real, fake = self(images).float(), self(reconstructions.detach()).float()
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        judged = functional_call(self, fixed, (reconstructions,)).float()
        if self.generator_loss == "hinge":
            adversarial = -judged.mean()
        else:
            adversarial = F.softplus(-judged.mean(dim=(1, 2, 3))).mean()
        discriminator = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        if self.lecam is not None:
            discriminator = discriminator + self.lecam(real, fake)
        return Game(adversarial, discriminator)


class LeCam(nn.Module):
    """weight x (mean relu(D(x) - a')^2 + mean relu(a - D(x'))^2), a and a' the running means of the
    scores of images and of reconstructions: it holds a discriminator back that few images teach.

    These are the one-sided terms of the authors' code, where eq. 3 of the paper (arXiv:2104.03310)
    has squared distances. The means are over the steps before, of all ranks; without one it is 0.

    Args:
        weight: of the term in the discriminator's loss, 0.3 at most in the paper.
        decay: of the means, a step.
    """

    def __init__(self, weight: float, decay: float = 0.99) -> None:
        super().__init__()
        self.weight = weight
        self.means = RunningMean(2, decay)

    def forward(
        self,
        real: Float[Tensor, "batch 1 rows columns"],
        fake: Float[Tensor, "batch 1 rows columns"],
    ) -> Float[Tensor, ""]:
        of_real, of_fake = self.means.mean.to(real.dtype)
        term = F.relu(real - of_fake).square().mean() + F.relu(of_real - fake).square().mean()
        self.means.collect(torch.stack([real.detach().mean(), fake.detach().mean()])[None])
        return self.weight * torch.where(self.means.steps > 0, term, 0.0 * term)


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    adversarial_loss: Float[Tensor, ""],
    last_layer: Float[Tensor, "*weights"],
) -> Float[Tensor, ""]:
    """|grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-4), at most 1e4.

    Both gradients are those at the decoder's last layer, averaged over ranks, so that all ranks
    have the weight of one rank on the joined batch; every rank must call it. `autograd.grad` only
    returns them: nothing is added to `.grad`, so DeepSpeed's hooks on parameters, which a backward
    pass of the whole loss sets off, see none of it. No gradient flows through the weight.
    """
    norms = [
        total(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    ranks = total(torch.ones_like(norms[0]))
    return (norms[0] / (norms[1] + ranks * DELTA)).clamp(max=LARGEST_WEIGHT)
