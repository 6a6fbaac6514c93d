"""The most bytes of tensors that are alive at once on the CPU, counted by PyTorch's profiler."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Of what work makes, beside what there was before.

    The allocator's own totals are read, because times of events are not exact enough to add its
    steps up in their order: they come from the counters of two processors.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.empty(1)
        work()
        del first
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    before = min(memory, key=lambda event: event["ts"])["args"]
    totals = [event["args"]["Total Allocated"] for event in memory]
    return max(totals) - before["Total Allocated"] + before["Bytes"]
