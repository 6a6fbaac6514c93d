"""The page in Chromium: its numbers are those of report.json, and nothing overflows or overlaps."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simvq_moe.records.catalogue import usage_leaves
from simvq_moe.records.printing import mean_and_sd
from simvq_moe.reports.report import report
from tests.reports.printed import missing
from tests.reports.synthetic import CODES_ARMS, write_meta, write_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
WIDTHS = (390, 1280)
"""Pixels of a phone and of a desktop."""

READ = """
function seen(page, width) {
  const all = [...page.querySelectorAll('body *')];
  page.querySelectorAll('details').forEach(one => { one.open = true; });
  const scrolls = one => one.closest('.scroll, pre') && !one.matches('.scroll, pre');
  const box = one => one.getBoundingClientRect();
  const name = one => one.tagName + ' ' + one.textContent.trim().slice(0, 60);
  const outside = (one, left, right) => box(one).left < left - 1 || box(one).right > right + 1;
  const wide = all.filter(one => !one.closest('svg') && !scrolls(one) && outside(one, 0, width));
  const cut = [], overlapping = [];
  for (const svg of page.querySelectorAll('figure svg')) {
    const texts = [...svg.querySelectorAll('text')];
    const frame = box(svg);
    cut.push(...texts.filter(one => outside(one, frame.left, frame.right)
      || box(one).top < frame.top - 1 || box(one).bottom > frame.bottom + 1).map(name));
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
      const p = box(a), q = box(b);
      const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      // boxes of letters are taller than the letters
      if (across > 2 && down > 5) overlapping.push(name(a) + ' | ' + name(b));
    }));
  }
  const within = '#answers, #predictions, #results, #differences, #routers, #cost, #negative';
  const read = [...page.querySelectorAll(within)].flatMap(section =>
    [...section.querySelectorAll('td, th, p, li, summary, small')].map(one => one.innerText));
  const rows = [...page.querySelectorAll('table.results tr')].map(row =>
    [...row.cells].map(one => one.innerText.split('\\n')[0].trim()));
  return {width: page.documentElement.scrollWidth, wide: wide.map(name), cut, overlapping, read,
    rows, pictures: page.querySelectorAll('svg').length};
}
window.onload = () => {
  const found = {};
  document.querySelectorAll('iframe').forEach(one => {
    found[one.width] = seen(one.contentDocument, Number(one.width));
  });
  document.getElementById('found').textContent = JSON.stringify(found);
};
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep of six seeds with a primary test and a failed run."""
    base = tmp_path_factory.mktemp("browser")
    sweep = write_sweep(base / "sweep", seeds=6, primary={"simvq": "val/codes/used"})
    failed = sweep / "codes/ema/seed1"
    (failed / "summary.json").unlink()
    write_meta(failed, CODES_ARMS[1], 1, status="failed", error="loss became nan " * 20)
    report([sweep], base / "out")
    return base / "out"


@pytest.fixture(scope="module", params=["light", "dark"])
def found(request: pytest.FixtureRequest, written: Path) -> dict[str, Any]:
    """What Chromium sees at each width: the page in frames of a wrapper that reads them."""
    source = html.escape((written / "report.html").read_text())
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{source}"></iframe>' for width in WIDTHS
    )
    wrapper = written / "wrapper.html"
    start = f'<!doctype html><meta charset="utf-8"><script>{READ}</script>'
    wrapper.write_text(f'{start}{frames}<pre id="found"></pre>')
    scheme = 0 if request.param == "dark" else 1
    dom = chromium(
        written, wrapper, "--dump-dom", f"--blink-settings=preferredColorScheme={scheme}"
    )
    text = dom.partition('<pre id="found">')[2].partition("</pre>")[0]
    assert text, "the wrapper's script did not run"
    return json.loads(html.unescape(text))


def chromium(folder: Path, page: Path, *options: str) -> str:
    """Standard output of one headless run, without sandbox (for root) and without network."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
            *("--window-size=1400,2000", "--virtual-time-budget=10000", *options),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def each(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    assert set(found) == {str(width) for width in WIDTHS}
    yield from found.values()


def test_nothing_is_wider_than_the_page(found: dict[str, Any]):
    for width, seen in zip(WIDTHS, each(found), strict=True):
        assert seen["wide"] == []
        assert seen["width"] <= width
        assert seen["pictures"] > 20


def test_texts_of_figures_are_inside_and_apart(found: dict[str, Any]):
    for seen in each(found):
        assert seen["cut"] == []
        assert seen["overlapping"] == []


def test_numbers_on_the_page_are_those_of_the_json(found: dict[str, Any], written: Path):
    content = json.loads((written / "report.json").read_text())
    for seen in each(found):
        absent, printed = missing(seen["read"], content)
        assert absent == []
        assert printed > 1000


def test_every_arm_has_its_own_means_in_the_result_table(found: dict[str, Any], written: Path):
    content = json.loads((written / "report.json").read_text())
    for seen in each(found):
        rows = {row[0]: row for row in seen["rows"]}
        for group in content["groups"]:
            start = "val/codes/" if group["kind"] == "codes" else "val/moe/mean/"
            metrics = [group["outcomes"][0], *(start + name for name in usage_leaves("table"))]
            for arm in group["arms"]:
                expected = [mean_and_sd(m, arm["mean"][m], arm["sd"][m]) for m in metrics]
                assert rows[arm["label"]][2:-1] == expected
