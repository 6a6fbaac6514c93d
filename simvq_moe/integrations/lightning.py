"""The usage of codes and experts in a run of Lightning's Trainer, in whatever it logs to."""

from __future__ import annotations

from typing import Any

from simvq_moe.core.collectives import total
from simvq_moe.core.step_state import after_step, follow_steps
from simvq_moe.core.usage import counters
from simvq_moe.records.usage_metrics import layers_of, usage_metrics

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"{error}: needs lightning>=2.4, pip install 'simvq-moe[lightning]'"
    ) from error


class UsageCallback(Callback):
    """Logs the measures of every codebook and MoE layer, every `log_every_n_steps` of the trainer,
    which are batches that step.

        Trainer(callbacks=[UsageCallback()])

    Metrics are called as in a run of ours: `codes/used`, `moe/00/max_vio`, `moe/mean/entropy`.
    Counts are of the steps since the last log, over all ranks. What changes once an optimizer step
    (codebooks that average or restart, balancing biases, whitening) follows it here, so that
    gradient accumulation changes nothing. A model of transformers is metered first
    (`integrations.meters.meter`).
    """

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        follow_steps(pl_module)
        self.step = trainer.global_step
        for counter in counters(pl_module):
            counter.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """After a micro-batch; the last one of a step has stepped the optimizer."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        after_step(pl_module)
        found = counters(pl_module)
        # what is logged in another batch is not sent; with two optimizers a batch takes two steps
        if not found or not trainer._logger_connector.should_update_logs:
            return
        counts = [total(counter.take()).cpu().numpy() for counter in found]
        pl_module.log_dict(usage_metrics(layers_of(found), counts))
