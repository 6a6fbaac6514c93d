"""A plug-in: points of a plane in codes and back, by way of experts. `plugins: [my_task.py]`,
`task: points`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.config.ranges import Channels
from simvq_moe.config.registry import register as register_options
from simvq_moe.config.schema import Config, TaskOptions
from simvq_moe.errors import ConfigError
from simvq_moe.moe.layer import build_mixture
from simvq_moe.moe.losses import mean_losses
from simvq_moe.moe.routers.base import Routing
from simvq_moe.tasks.base import CountedSample, Task
from simvq_moe.tasks.registry import register
from simvq_moe.tasks.samples import Samples

SOURCES = {"circle": (1.0, 1.0), "ellipse": (2.0, 0.5)}


@register_options
@dataclass(frozen=True)
class PointsOptions(TaskOptions):
    """Encoder and decoder of points."""

    kind: Literal["points"] = "points"
    hidden: Channels = 8
    """Channels between the two layers."""


class Points:
    """Evenly spread angles, from a first one on."""

    def __init__(self, source: str, number: int, first: float) -> None:
        angles = first + torch.arange(number) * (2 * torch.pi / number)
        self.points = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(SOURCES[source])

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices: Any) -> Tensor:
        return self.points[torch.as_tensor(indices)]


class PointsModel(nn.Module):
    """A layer, experts beside it, a quantizer, and two layers."""

    def __init__(self, config: Config, hidden: int) -> None:
        super().__init__()
        self.quantizer = config.quantizer.build()
        width = config.quantizer.width
        self.encoder = nn.Sequential(nn.Linear(2, hidden), nn.ReLU())
        self.mixture = build_mixture(hidden, config.moe, None)
        self.latents = nn.Linear(hidden, width)
        self.decoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        self.loss_weights, self.balance = config.moe.loss_weights, config.moe.balance

    def reconstruct(self, x: Float[Tensor, "batch 2"]) -> tuple[Tensor, Any, Routing]:
        hidden = self.encoder(x)
        mixed, routing = self.mixture(hidden, with_routing=True)
        out = self.quantizer(self.latents(hidden + mixed))
        return self.decoder(out.z_q.to(x.dtype)), out, routing

    def forward(self, x: Float[Tensor, "batch 2"]) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, out, routing = self.reconstruct(x)
        error = (reconstruction - x).square().mean()
        losses = mean_losses([routing], all_ranks=self.training, balance=self.balance.loss)
        weighted = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        return error + out.loss + weighted, {"mse": error}


@register
class PointsTask(Task[PointsModel]):
    """Points of a closed curve."""

    name = "points"
    embedded = "circle"
    sections = ("quantizer", "moe", "task_options")

    def __init__(self, config: Config) -> None:
        source, data = self.source(config), config.data
        super().__init__(
            config=config,
            model=self.build_model(config),
            train=Points(source, data.crops, 0.0),
            held_out=Points(source, data.held_out_crops, 0.01),
            data_digest=f"{source} {data.crops} {data.held_out_crops}",
        )

    @classmethod
    def check_files(cls, config: Config) -> None:
        if cls.source(config) not in SOURCES:
            raise ConfigError(
                f"data.source {config.data.source!r}: use one of {', '.join(map(repr, SOURCES))}"
            )

    @classmethod
    def _model(cls, config: Config) -> PointsModel:
        assert isinstance(config.task_options, PointsOptions)
        return PointsModel(config, config.task_options.hidden)

    @classmethod
    def tokens_of_a_sample(cls, config: Config) -> int:
        del config
        return 1

    @classmethod
    def counted_sample(cls, config: Config) -> CountedSample:
        return CountedSample(shape=(2,), numbers=2 * config.quantizer.width)

    @classmethod
    def without_maps(cls, config: Config) -> Config:
        folded = config.quantizer.folded()
        if folded is None:
            raise ConfigError(f"quantizer.kind {config.quantizer.kind!r} has no shared map")
        return replace(config, quantizer=folded, moe=config.moe.folded())

    @classmethod
    def outputs_of_noise(cls, model: PointsModel, config: Config) -> Tensor:
        del config
        return model.reconstruct(torch.randn(8, 2).double())[0]

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        error = (self.model.reconstruct(batch)[0] - batch).square().mean(1).double()
        return {"error": error.sum(), "points": torch.tensor(float(len(batch)))}

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"val/loss": sums["error"] / sums["points"]}

    def samples(self, step: int, device: torch.device) -> Samples:
        del device
        return Samples(text=f"{len(self.held_out)} points at step {step}\n")
