"""The pages build as a site without a warning: no broken link, no page that nothing leads to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_readme_is_the_first_page_and_leads_on(site: Path):
    first = (site / "index.html").read_text()
    assert "SimVQ" in first
    assert 'href="results/"' in first
    assert (site / "results" / "index.html").is_file()


def test_public_names_stand_with_their_signature(site: Path):
    page = (site / "api" / "index.html").read_text()
    for name in ("SimVQ", "MoE", "ResidualQuantizer", "usage", "meter", "UsageCallback"):
        assert f">{name}<" in page, name


def test_links_to_files_of_the_repository_are_their_paths(site: Path):
    page = (site / "plugins" / "index.html").read_text()
    assert "<code>tests/moe/my_router.py</code>" in page
    assert "../tests" not in page


def test_what_peers_have_is_shown_by_tests_that_exist():
    page = (ROOT / "docs" / "features.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            text = (ROOT / file).read_text()
            assert "def test_" in text
            assert not test or f"def {test}(" in text, test
