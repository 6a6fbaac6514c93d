"""The usage of experts in a run of transformers' Trainer, in its trackers and in a run folder.

`Trainer` logs a loss; `UsageCallback` logs beside it, for the same window and to the same trackers,
how the experts were used. With a folder it leaves the records that a run of ours leaves, which
`simvq-moe watch` and `simvq-moe dashboard` show.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from simvq_moe.core.collectives import total
from simvq_moe.files.of_runs import CONFIG, META, SUMMARY
from simvq_moe.files.regular import write_atomically, write_json
from simvq_moe.files.yaml import plain_yaml
from simvq_moe.integrations.meters import counters_by_layer, meter
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.tensorboard import heat_map, loads
from simvq_moe.records.usage_metrics import Layer, layers_of, usage_metrics

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
except ImportError as error:
    raise ImportError(f"{error}: needs transformers>=5, pip install 'simvq-moe[hf]'") from error

logger = logging.getLogger(__name__)

LOGGED = ("used", "dead", "max_vio", "entropy")
"""Measures of each layer that trackers get; a folder gets all."""
HEAT_MAP = "moe/load"
"""Layers x experts, as loads: 1 is the fair share."""


class UsageCallback(TrainerCallback):
    """Logs used, dead, MaxVio and entropy of each layer, and a heat map, where the loss is logged.

        trainer.add_callback(UsageCallback(trainer, folder="runs/mine"))

    The model is metered when training begins. Metrics are called as in a run of ours:
    `moe/00/used`, and `moe/mean/used` for the mean over layers, which the trainer's log history has
    too. A tracker that fails is named once and left alone; training goes on.

    Args:
        trainer: of transformers, or of what builds on it such as trl, whose trackers are used.
        folder: of metrics.jsonl, usage.npz, meta.json and TensorBoard's events, for `simvq-moe
            watch` and `simvq-moe dashboard`; None: there is none.
    """

    def __init__(self, trainer: Trainer, *, folder: str | Path | None = None) -> None:
        self.trainer = trainer
        self.folder = None if folder is None else Path(folder)
        self.layers: list[Layer] = []
        self.records: RunLog | None = None
        self.last: dict[str, float] = {}
        self.failed: set[str] = set()

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **named: Any) -> None:
        del args
        model = named["model"]
        meter(model)
        self.layers = layers_of([*counters_by_layer(model).values()])
        for counter in counters_by_layer(model).values():
            counter.take()
        if self.folder is None or not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"name": self.folder.name, "train": {"steps": state.max_steps}}
        write_atomically(self.folder / CONFIG, plain_yaml(about))
        self._say("running")
        step, steps = state.global_step, state.max_steps
        self.records = RunLog(self.folder, self.layers, step, steps=steps)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **named: Any,
    ) -> None:
        """Take the window that the logged loss is of; every rank comes here."""
        if not logs or "loss" not in logs:
            return
        model = named["model"]
        counts = take_counts(model)
        if not state.is_world_process_zero or not any(n.any() for n in counts):
            return
        step = state.global_step
        metrics = usage_metrics(self.layers, counts)
        self.last = {"train/loss": float(logs["loss"])} | metrics
        state.log_history.append(
            {name: metrics[name] for name in metrics if "/mean/" in name} | {"step": step}
        )
        shown = {name: value for name, value in metrics.items() if name.split("/")[-1] in LOGGED}
        pixels = heat_map(np.stack([loads(n) for n in counts]))
        for tracker in self._trackers():
            self._try(tracker, tracker.on_log, args, state, control, logs=dict(shown), **named)
            draw = DRAWN.get(type(tracker).__name__)
            if draw is not None:
                self._try(tracker, draw, tracker, pixels, step)
        if self.records is not None:
            line = {**self.last, "time": time.time()}
            self.records.write(step, line, counts, None)

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.records is not None:
            self.records.write_usage()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.on_save()

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        del args
        if self.records is None or self.folder is None:
            return
        self.records.close()
        self.records = None
        finished = state.global_step >= state.max_steps
        if finished:
            summary = {"status": "finished", "step": state.global_step, **self.last}
            write_json(self.folder / SUMMARY, summary)
        self._say("finished" if finished else "interrupted")

    def _trackers(self) -> list[Any]:
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        callbacks = self.trainer.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, kinds)]

    def _try(self, tracker: Any, log: Callable[..., Any], *args: Any, **named: Any) -> None:
        name = type(tracker).__name__
        if name in self.failed:
            return
        try:
            log(*args, **named)
        except Exception as error:  # of a tracker, which is a help and no need
            self.failed.add(name)
            logger.warning("%s gets no usage of experts any more: %s", name, error)

    def _say(self, status: str) -> None:
        assert self.folder is not None
        layers = [dict(vars(layer)) for layer in self.layers]
        meta = {"status": status, "command": " ".join(sys.argv), "layers": layers}
        write_json(self.folder / META, meta)


def take_counts(model: nn.Module) -> Sequence[np.ndarray]:
    """Counts of each layer since they were last taken, over all ranks, which call it together."""
    counters = counters_by_layer(model).values()
    return [total(counter.take()).cpu().numpy() for counter in counters]


def _in_tensorboard(tracker: Any, pixels: np.ndarray, step: int) -> None:
    if tracker.tb_writer is not None:
        tracker.tb_writer.add_image(HEAT_MAP, pixels, step, dataformats="HWC")


def _in_wandb(tracker: Any, pixels: np.ndarray, step: int) -> None:
    wandb = tracker._wandb
    wandb.log({HEAT_MAP: wandb.Image(pixels), "train/global_step": step})


def _in_trackio(tracker: Any, pixels: np.ndarray, step: int) -> None:
    trackio = tracker._trackio
    trackio.log({HEAT_MAP: trackio.Image(pixels)}, step=step)


def _in_mlflow(tracker: Any, pixels: np.ndarray, step: int) -> None:
    tracker._ml_flow.log_image(pixels, artifact_file=f"{HEAT_MAP}/{step:06d}.png")


DRAWN: dict[str, Callable[[Any, np.ndarray, int], None]] = {
    "TensorBoardCallback": _in_tensorboard,
    "WandbCallback": _in_wandb,
    "TrackioCallback": _in_trackio,
    "MLflowCallback": _in_mlflow,
}
"""How each tracker of transformers takes a picture."""
