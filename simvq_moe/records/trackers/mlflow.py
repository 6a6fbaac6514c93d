"""MLflow; MLFLOW_TRACKING_URI and the like mean what they always do."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from simvq_moe.config.registry import register
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions

ID_TAG = "simvq_moe_run"
"""Tag with our id, by which a resumed run is found, for MLflow gives runs ids of its own."""
LONGEST = 500
"""Characters of a parameter that every store takes."""
AT_ONCE = 100
"""Parameters, or metrics, of a call."""


@register
@dataclass(frozen=True)
class MlflowOptions(TrackerOptions):
    """MLflow; without MLFLOW_TRACKING_URI in `mlflow.db` of the working directory."""

    kind: Literal["mlflow"] = "mlflow"
    package: ClassVar[str] = "mlflow"

    def open(self, run: TrackedRun) -> Tracker:
        return Mlflow(run)


class Mlflow(Tracker):
    """A run in the experiment; pictures, sounds and texts are artifacts."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow = import_module("mlflow")
        self.entities: Any = import_module("mlflow.entities")
        for name in ("mlflow", "alembic"):  # which tell of every table that they make
            logging.getLogger(name).setLevel(logging.WARNING)
        self.client: Any = mlflow.MlflowClient()
        found = self._found(self._experiment(run.project), run)
        self.run_id = found.info.run_id
        there = found.data.params
        parameters = [
            self.entities.Param(key, str(value)[:LONGEST])
            for key, value in run.parameters.items()
            if key not in there
        ]
        for part in _parts(parameters):
            self.client.log_batch(self.run_id, params=part)

    def write(self, line: LoggedLine) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self.entities.Metric(name, value, now, line.step)
            for name, value in line.metrics.items()
        ]
        for part in _parts(metrics):
            self.client.log_batch(self.run_id, metrics=part)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.client.log_image(self.run_id, pixels, artifact_file=f"{name}/{step:06d}.png")

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        import soundfile  # only runs over recordings need it

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{step:06d}.wav"
            soundfile.write(file, clip, sample_rate)
            self.client.log_artifact(self.run_id, file, artifact_path=name)

    def text(self, name: str, text: str, step: int) -> None:
        self.client.log_text(self.run_id, text, f"{name}/{step:06d}.md")

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(Exception):  # another run may just have made it
                return self.client.create_experiment(name)
            found = self.client.get_experiment_by_name(name)
        return found.experiment_id

    def _found(self, experiment: str, run: TrackedRun) -> Any:
        """The run that has our id, or a new one."""
        known = self.client.search_runs([experiment], f"tags.{ID_TAG} = '{run.id}'", max_results=1)
        if known:
            self.client.update_run(known[0].info.run_id, status="RUNNING")
            return known[0]
        tags = {**run.tags, ID_TAG: run.id}
        return self.client.create_run(experiment, tags=tags, run_name=run.name)


def _parts(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE)]
