"""HParams of TensorBoard with the columns that compare runs: keys that differ, final measures.

TensorBoard's own would take all columns from whichever run it finds one in, or show every scalar
that was ever logged as a measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import backend_context, metadata
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin

from simvq_moe.records.catalogue import names, results

FIRST = ("task", "arm", "seed", "optimizer.lr", "train.steps")
"""Columns with which the table begins, for of all it shows five unasked."""
NAMES = ("name", "runs_dir")
"""Keys that say which run it is, and so differ where nothing else does."""


class ComparedRuns(backend_context.Context):
    """What the tab knows of the runs that are served, read anew for each request."""

    def experiment_from_metadata(
        self,
        ctx: Any,
        experiment_id: str,
        include_metrics: bool,
        hparams_run_to_tag_to_content: Mapping[str, Mapping[str, bytes]],
        data_provider_hparams: Any,
        hparams_limit: int | None = None,
    ) -> Any:
        """The columns: keys whose values differ, those of `FIRST` first, and final measures."""
        rows = {
            run: {tag: row for tag, row in tags.items() if tag != metadata.EXPERIMENT_TAG}
            for run, tags in hparams_run_to_tag_to_content.items()
        }
        found = super().experiment_from_metadata(
            ctx, experiment_id, include_metrics, rows, data_provider_hparams
        )
        keys = [one for one in found.hparam_infos if one.differs and one.name not in NAMES]
        # of a single run, or of equal ones, what would be compared first
        keys = keys or [one for one in found.hparam_infos if one.name in FIRST]
        keys.sort(key=lambda one: FIRST.index(one.name) if one.name in FIRST else len(FIRST))
        final = {name: i for i, name in enumerate(final_measures())}
        measures = [one for one in found.metric_infos if one.name.tag in final]
        measures.sort(key=lambda one: final[one.name.tag])
        for field, kept in (
            ("hparam_infos", keys[: hparams_limit or None]),
            ("metric_infos", measures),
        ):
            found.ClearField(field)
            getattr(found, field).extend(kept)
        return found


class HParamsTab(HParamsPlugin):
    """TensorBoard's tab over `ComparedRuns`."""

    def __init__(self, context: TBContext) -> None:
        super().__init__(context)
        self._context = ComparedRuns(context)


def final_measures() -> list[str]:
    """Names of scalars whose last value says how a run has ended."""
    return [*results(), *(name for name in names("overview") if name.startswith("speed/"))]
