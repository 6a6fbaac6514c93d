"""Usage in a run of Lightning: the counts of its steps, and state that follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simvq_moe import EMAVQ, MoE, SimVQ, usage
from simvq_moe.core.step_state import after_step, follow_steps

lightning: Any = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")
"""Lightning warns of much that a small run has on purpose."""


class Model(lightning.LightningModule):
    def __init__(self, quantizer: type[SimVQ] | type[EMAVQ]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = MoE(width=8, hidden=4, experts=8, top_k=2)
        self.quantizer = quantizer(16, 8)
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], _: int) -> Any:
        self.seen.append(batch[0])
        out = self.quantizer(self.layer(batch[0]))
        return out.loss + out.z_q.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logged(lightning.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append({**metrics, "step": step or 0})


def trained(
    model: Model, folder: Path, micro_batches: int = 1, *, steps: int = 4, every: int = 2
) -> list[dict[str, float]]:
    from simvq_moe.integrations.lightning import UsageCallback

    logged = Logged()
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        log_every_n_steps=every,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=logged,
        callbacks=[UsageCallback()],
        default_root_dir=folder,
        accumulate_grad_batches=micro_batches,
    )
    trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=8 // micro_batches))
    return logged.lines


def test_measures_are_those_of_what_was_drawn_since_the_last_log(tmp_path: Path) -> None:
    model = Model(SimVQ)
    lines = trained(model, tmp_path)
    last = [line for line in lines if "codes/used" in line][-1]
    assert last["codes/window_tokens"] == last["moe/window_tokens"] == 16
    # the same steps by hand
    own = Model(SimVQ)
    optimizer: Any = own.configure_optimizers()
    for i, batch in enumerate(model.seen):
        if i == 2:
            own.quantizer.counter.take()
            own.layer.counter.take()
        optimizer.zero_grad()
        own.training_step([batch], i).backward()
        optimizer.step()
    found = {"codes": usage(own.quantizer.usage), "moe/00": usage(own.layer.usage)}
    for name, one in found.items():
        for measure, value in one.as_dict().items():
            assert last[f"{name}/{measure}"] == pytest.approx(value), (name, measure)


def test_a_layer_that_nothing_goes_through_has_no_measures_and_takes_none_from_others(
    tmp_path: Path,
) -> None:
    model = Model(SimVQ)
    model.idle = MoE(width=8, hidden=4, experts=8, top_k=2)
    last = [line for line in trained(model, tmp_path) if "codes/used" in line][-1]
    assert last["codes/window_tokens"] == last["moe/window_tokens"] == 16
    assert last["moe/mean/entropy"] == last["moe/00/entropy"]
    assert "moe/01/entropy" not in last


class TwoOptimizers(Model):
    """Takes two steps a batch."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.layer, self.quantizer)]

    def training_step(self, batch: list[Tensor], _: int) -> Any:
        self.manual_backward(super().training_step(batch, _))
        for optimizer in self.optimizers():
            optimizer.step()


def test_no_window_is_lost_where_steps_come_in_twos(tmp_path: Path) -> None:
    lines = trained(TwoOptimizers(SimVQ), tmp_path, steps=8, every=3)
    windows = [line["codes/window_tokens"] for line in lines if "codes/used" in line]
    assert windows == [24]  # three batches, six steps; the fourth batch waits for two more


def test_averages_follow_steps_and_not_micro_batches(tmp_path: Path) -> None:
    whole, parts = Model(EMAVQ), Model(EMAVQ)
    trained(whole, tmp_path)
    trained(parts, tmp_path, micro_batches=2)
    own = Model(EMAVQ)
    follow_steps(own)
    optimizer: Any = own.configure_optimizers()
    for batch in parts.seen:
        assert len(batch) == 4
    for first, second in zip(parts.seen[::2], parts.seen[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (first, second):
            (own.training_step([batch], 0) / 2).backward()
        optimizer.step()
        after_step(own)
    for name, value in parts.state_dict().items():
        assert torch.equal(value, own.state_dict()[name]), name
    torch.testing.assert_close(whole.quantizer.codebook(), parts.quantizer.codebook())
