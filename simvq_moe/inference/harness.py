"""Tasks of lm-eval on a run's language model, which is exported for it first.

A task is one of lm-eval's by its name, or a YAML file in its form that says data alone: nothing in
it is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simvq_moe.engine.devices import this_device
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import SUMMARY
from simvq_moe.files.regular import read_json, write_json
from simvq_moe.files.temporary import temporary_folder
from simvq_moe.files.yaml import read_yaml
from simvq_moe.inference.export import export_run
from simvq_moe.records.catalogue import OF_TASKS
from simvq_moe.records.trackers.tensorboard import write_evaluations
from simvq_moe.runs.folder import has_summary

BATCH = 16
"""Requests that lm-eval makes together."""


def evaluate_tasks(
    run_dir: Path, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, float]:
    """Measures of tasks, as eval/<task>/<measure>; they also join the summary of a finished run,
    and its TensorBoard.

    Args:
        tasks: names of lm-eval's, or files.
        limit: examples of each task at most; None: all. Fewer than all join no summary.

    Raises:
        ConfigError: lm-eval is missing, a task is unknown, or the run can't be exported.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval ({error}): pip install 'simvq-moe[eval]'"
        ) from None
    known = TaskManager()
    asked = [_task(task, known.all_tasks) for task in tasks]
    with temporary_folder("simvq_moe_eval_") as folder:
        out = folder / "hf"
        export_run(run_dir, out, "hf")
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(out), "dtype": "float32"},
            tasks=asked,
            task_manager=known,
            device=str(this_device()),
            batch_size=BATCH,
            limit=limit,
        )
    measures = measures_of(found["results"])
    if limit is None and has_summary(run_dir):
        join_summary(run_dir, measures)
    return measures


def join_summary(run_dir: Path, measures: Mapping[str, float]) -> None:
    """Put measures of tasks into summary.json in place of what these tasks had before, and all
    that there are into TensorBoard, where the run is in it."""
    tasks = tuple({name.rpartition("/")[0] + "/" for name in measures})
    before = read_json(run_dir / SUMMARY, dict)
    kept = {name: value for name, value in before.items() if not name.startswith(tasks)}
    summary = kept | dict(measures)
    write_json(run_dir / SUMMARY, summary)
    step = summary.get("step")
    if isinstance(step, int | float) and 0 <= step < 2**53:
        found = {name: value for name, value in summary.items() if name.startswith(OF_TASKS)}
        write_evaluations(run_dir / "tensorboard", int(step), found)


def measures_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's numbers by our names, without the errors that it estimates: of the filter "none"
    the measure alone."""
    measures = {}
    for task, numbers in results.items():
        for name, value in numbers.items():
            measure, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered and not measure.endswith("_stderr"):
                kept = measure if filtered == "none" else f"{measure}_{filtered}"
                measures[f"{OF_TASKS}{_word(task)}/{_word(kept)}"] = float(value)
    return measures


def _task(given: str, known: Sequence[str]) -> str | dict[str, Any]:
    if given.endswith((".yaml", ".yml")):
        return read_yaml(Path(given))
    if given not in known:
        raise ConfigError(
            f"--tasks {given} is none of lm-eval's, which lm-eval ls tasks lists: give one of "
            "them, or a .yaml file"
        )
    return given


def _word(text: str) -> str:
    """Fit to be a part of a metric's name."""
    return re.sub(r"[^\w.-]", "_", text)
