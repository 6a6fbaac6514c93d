"""TensorBoard over a folder of runs, on this machine only.

TensorBoard calls a run by the folder of its events. It is given folders with links to the files of
events, so that runs are called as in the folder of runs, that it does not search checkpoints for
events, and that it reads nothing which a run folder only links to.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tensorboard import default, program
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin

from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import FOLDERS
from simvq_moe.files.regular import is_inside
from simvq_moe.files.temporary import temporary_folder
from simvq_moe.reports.hparams_tab import HParamsTab
from simvq_moe.usage_tab.plugin import NAME, UsageTabLoader

SAMPLES_KEPT = 200
"""Steps of each heat map and histogram that the slider reaches; TensorBoard's own default is 10."""
LAST_PORT = 65_535
SECONDS_BETWEEN_LOOKS = 5
"""Seconds until it looks for new runs again, and TensorBoard for new events."""


def serve(runs_dir: Path, port: int) -> int:
    """Serve until interrupted; 0 as port takes a free one.

    Raises:
        ConfigError: the folder does not exist, or the port is none, or taken.
    """
    if not 0 <= port <= LAST_PORT:
        raise ConfigError(f"--port {port} is no port: use 1 to {LAST_PORT}, or 0 for a free one")
    if not runs_dir.is_dir():
        raise ConfigError(f"{runs_dir} does not exist: give the folder that holds the runs")
    with temporary_folder("simvq_moe_dashboard_") as links:
        link_runs(runs_dir, links)
        address = start(links, port, runs_dir)
        print(address, file=sys.stderr)
        print(f"the tab of usage: {address}#{NAME}", file=sys.stderr)
        print("Ctrl-C stops it", file=sys.stderr)
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            link_runs(runs_dir, links)


def link_runs(runs_dir: Path, links: Path) -> None:
    """Link the events of every run at or below runs_dir under the run's own name; drop the links
    to files that are gone."""
    for name, folders, _ in os.walk(runs_dir):
        if "tensorboard" not in folders:
            continue
        folders[:] = [folder for folder in folders if folder not in FOLDERS]
        inside = os.path.relpath(name, runs_dir)
        own = links / (Path(name).resolve().name if inside == "." else inside)
        for file in (Path(name) / "tensorboard").glob("*tfevents*"):
            link = own / file.name
            if file.is_file() and is_inside(file, Path(name)) and not link.is_symlink():
                # a run may be called like a file of another run's events
                with suppress(FileExistsError, NotADirectoryError):
                    own.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.resolve())
    for name, _, files in os.walk(links):
        for file in files:
            if not (link := Path(name, file)).exists():
                link.unlink()


def start(folder: Path, port: int, runs_dir: Path) -> str:
    """Start the server in the background; its address.

    Args:
        folder: of the events.
        port: of the server.
        runs_dir: of the runs, which the tab of usage reads; that tab is the first, and so opens.
    """
    # installed or not, there is one such tab: that of this folder
    others = [
        HParamsTab if plugin is HParamsPlugin else plugin
        for plugin in default.get_plugins()
        if plugin is not UsageTabLoader
    ]
    server = program.TensorBoard(plugins=[UsageTabLoader(runs_dir), *others])
    server.configure(
        argv=[
            "tensorboard",
            *("--logdir", str(folder)),
            *("--host", "127.0.0.1"),
            *("--port", str(port)),
            *("--reload_interval", str(SECONDS_BETWEEN_LOOKS)),
            *("--samples_per_plugin", f"images={SAMPLES_KEPT},histograms={SAMPLES_KEPT}"),
        ]
    )
    try:
        return server.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"--port {port}: {error}; use --port 0 for a free one") from None
