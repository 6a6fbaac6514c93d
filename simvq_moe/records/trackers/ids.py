"""Ids by which a resumed run is found again in its trackers; meta.json keeps them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from simvq_moe.config.registry import of_kind
from simvq_moe.records.trackers.base import TrackerOptions


def known_ids(meta: Any) -> dict[str, str]:
    """The ids that meta.json names, whatever else stands there."""
    found = meta.get("trackers") if isinstance(meta, dict) else None
    named = found.items() if isinstance(found, dict) else ()
    return {
        name: given
        for name, given in named
        if isinstance(given, str) and re.fullmatch("[0-9a-f]{16}", given)
    }


def ids_of_run(names: Sequence[str], known: dict[str, str]) -> dict[str, str]:
    """The known ids, and new ones for trackers that had none and need one."""
    kinds = {name: of_kind(TrackerOptions, name, "train.trackers") for name in names}
    return {name: uuid4().hex[:16] for name, kind in kinds.items() if not kind.at_once} | known
