"""The pages build as a site without a warning: no broken link, no page that nothing leads to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILLERS = {"and", "any", "are", "the", "with", "without", "that", "not", "each", "other", "what"}
"""Words of a feature that say nothing of it."""
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


def features() -> list[str]:
    page = (ROOT / "docs" / "features.md").read_text()
    return [line for line in page.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("row", features(), ids=lambda row: row.split("|")[1].strip()[:40])
def test_a_page_that_explains_a_feature_has_a_word_of_it(row: str):
    feature, _, here, _ = row.strip("| ").split(" | ")
    pages = re.findall(r"\]\((\w+\.md)", here)
    text = "".join((ROOT / "docs" / page).read_text() for page in pages).lower()
    for part in re.split(r", | and | in ", feature.lower()):
        words = [w for w in re.findall(r"[\w-]{3,}", part) if w not in FILLERS]
        # of one stem: restarts and restart
        assert any(word.rstrip("s") in text for word in words), part


def test_what_peers_have_is_shown_by_tests_that_exist():
    assert features()
    for row in features():
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            text = (ROOT / file).read_text()
            assert "def test_" in text
            assert not test or f"def {test}(" in text, test
