"""Makes pages of a clone into pages of a site: README comes first, files lose their links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """README.md is the site's first page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A link to a file beside docs/ becomes its path in the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = link[2]
        # README's own links are relative to the clone's root
        here = ROOT if page.is_homepage and not (folder / target).exists() else folder
        path = (here / target).resolve()
        if "://" in target or path.is_relative_to(ROOT / "docs"):
            return link[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        name = str(path.relative_to(ROOT))
        return f"`{name}`" if link[1].strip("`") in (name, target) else f"{link[1]} (`{name}`)"

    return LINK.sub(named, markdown)
