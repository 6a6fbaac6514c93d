"""TensorBoard over a folder of runs, on this machine only."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tensorboard import default, program

from simvq_moe.merging import ConfigError

IMAGES_KEPT = 200
"""Steps of each heat map that the slider reaches; TensorBoard's own default is 10."""


def serve(runs_dir: Path, port: int) -> int:
    """Serve until interrupted; 0 as port takes a free one.

    Raises:
        ConfigError: the folder does not exist, or the port is taken.
    """
    if not runs_dir.is_dir():
        raise ConfigError(f"{runs_dir} does not exist: give the folder that holds the runs")
    print(start(runs_dir, port), file=sys.stderr)
    print("Ctrl-C stops it", file=sys.stderr)
    threading.Event().wait()
    return 0


def start(runs_dir: Path, port: int) -> str:
    """Start the server in the background; its address."""
    server = program.TensorBoard(plugins=default.get_plugins())
    server.configure(
        argv=[
            "tensorboard",
            *("--logdir", str(runs_dir)),
            *("--host", "127.0.0.1"),
            *("--port", str(port)),
            *("--reload_interval", "5"),
            *("--samples_per_plugin", f"images={IMAGES_KEPT},histograms={IMAGES_KEPT}"),
        ]
    )
    try:
        return server.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"--port {port}: {error}; use --port 0 for a free one") from None
