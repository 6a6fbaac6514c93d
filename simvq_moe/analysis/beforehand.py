"""What was written down before the first run of a sweep, by the stamps that the sweep recorded."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from simvq_moe.analysis.arms import Group
from simvq_moe.analysis.registered import Registered
from simvq_moe.analysis.results import Registration
from simvq_moe.runs.history import shown_name


def registrations(groups: Sequence[Group]) -> list[Registration]:
    """The files of each sweep with the commit of their last change, beside its first run's start;
    a file that changed while runs were going on is there once for each state."""
    found = []
    for sweep, members in _by_sweep(groups).items():
        first = _first_run(members)
        for stamp in members[0].registered:
            before = _is_before(stamp.date, first) if stamp.commit else None
            found.append(Registration(sweep, stamp.file, stamp.commit, stamp.date, first, before))
    return found


def came_before(one: Registered, groups: Sequence[Group]) -> bool | None:
    """Whether the rule and the sweeps that name the prediction were committed before the first run
    of each sweep, and unchanged since; None: that is not recorded."""
    name = shown_name(one.file)
    found = [
        r.before for r in registrations(groups) if r.file == name or not r.file.endswith(".py")
    ]
    sweeps = _by_sweep(groups)
    if not found or None in found or not all(members[0].registered for members in sweeps.values()):
        return None
    return all(found)


def _by_sweep(groups: Sequence[Group]) -> dict[str, list[Group]]:
    sweeps: dict[str, list[Group]] = {}
    for group in groups:
        if group.sweep:
            sweeps.setdefault(group.sweep, []).append(group)
    return sweeps


def _first_run(groups: Sequence[Group]) -> str | None:
    runs = (run for group in groups for arm in group.arms for run in arm.runs)
    texts = (str(run.meta.get("started")) for run in runs)
    started = [(time, text) for text in texts if (time := _time(text))]
    return min(started)[1] if started else None


def _is_before(date: str | None, start: str | None) -> bool | None:
    committed, started = _time(date), _time(start)
    return None if committed is None or started is None else committed < started


def _time(text: str | None) -> datetime | None:
    """A time with its zone; None: it is none that can be read, or has no zone."""
    try:
        return datetime.strptime(text or "", "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return None
