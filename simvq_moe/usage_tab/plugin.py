"""TensorBoard's plug-in: a tab named Usage over the folder that TensorBoard is given.

TensorBoard imports this at every start, also where our tab has nothing to show: what reads runs is
imported with the first question.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from http import HTTPStatus
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tensorboard.plugins import base_plugin

from simvq_moe.files.of_runs import USAGE

if TYPE_CHECKING:
    from simvq_moe.usage_tab.folders import Folder

NAME = "usage"
"""Name of the plug-in: the tab's address is #usage."""
STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
QUESTIONS = ("runs", "run", "window", "slot", "series")
"""Functions of `simvq_moe.usage_tab.answers`."""
LONGEST_QUERY = 100_000
MOST_FOLDERS = 10_000
"""Folders that are looked through at most for a run before there is a tab."""
NEEDED = ("pydantic", "tokenizers")
"""Packages of the extra `train`, without which there is no tab."""

Start = Callable[[str, list[tuple[str, str]]], Any]
"""WSGI's start_response."""


class UsageTab(base_plugin.TBPlugin):
    """The tab.

    Args:
        context: TensorBoard's, of which the folder of its runs is used.
        folder: of runs; None: that of the context.
    """

    plugin_name = NAME

    def __init__(self, context: base_plugin.TBContext, folder: Path | None = None) -> None:
        given = getattr(context, "logdir", None)
        self.path = folder or (Path(given).expanduser() if given else None)

    @cached_property
    def folder(self) -> Folder:
        from simvq_moe.usage_tab.folders import Folder

        return Folder(self.path or Path("."))

    def get_plugin_apps(self) -> dict[str, Callable[..., Iterable[bytes]]]:
        files = sorted(file for file in STATIC.iterdir() if file.suffix in TYPES)
        return {
            **{f"/{file.name}": partial(_serve_file, file) for file in files},
            **{f"/{name}": partial(self._serve_answer, name) for name in QUESTIONS},
        }

    def is_active(self) -> bool:
        """Whether any run has counted something."""
        if self.path is None:
            return False
        folders = islice(os.walk(self.path), MOST_FOLDERS)
        return any(USAGE in files for _, _, files in folders)

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Usage")

    def _serve_answer(
        self, name: str, environ: dict[str, Any], start_response: Start
    ) -> Iterable[bytes]:
        from simvq_moe.files.regular import BrokenFileError
        from simvq_moe.usage_tab import answers

        status, body = 200, {}
        query = environ.get("QUERY_STRING", "")
        try:
            if len(query) > LONGEST_QUERY:
                raise answers.WrongQuestionError(400, f"the question has {len(query)} characters")
            question = parse_qs(query, keep_blank_values=True)
            body = getattr(answers, name)(self.folder, question)
        except answers.WrongQuestionError as error:
            status, body = error.status, {"error": str(error)}
        except BrokenFileError as error:
            status, body = 422, {"error": str(error)}
        content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        return _respond(environ, start_response, status, content, "application/json")


class UsageTabLoader(base_plugin.TBLoader):
    """Makes the tab where what it needs is installed; named in the entry points of this package.

    Args:
        folder: of runs; None: that which TensorBoard is given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def load(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: base_plugin.TBContext
    ) -> UsageTab | None:
        if any(find_spec(name) is None for name in NEEDED):
            return None
        return UsageTab(context, self.folder)


def _serve_file(file: Path, environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
    return _respond(environ, start_response, 200, file.read_bytes(), TYPES[file.suffix])


def _respond(
    environ: dict[str, Any], start_response: Start, status: int, content: bytes, kind: str
) -> Iterable[bytes]:
    headers = [
        ("Content-Type", kind),
        ("Cache-Control", "no-cache, must-revalidate"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        status, content = 405, b'{"error":"only GET is answered"}'
    if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", "") and len(content) > 1_000:
        content = gzip.compress(content, compresslevel=3, mtime=0)
        headers.append(("Content-Encoding", "gzip"))
    headers.append(("Content-Length", str(len(content))))
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else content]
