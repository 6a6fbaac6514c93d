"""The tab in Chromium: its numbers are those of usage.npz, on a desktop and on a phone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.serving import make_server

from simvq_moe.core.usage import usage
from simvq_moe.records.usage_metrics import Layer
from simvq_moe.usage_tab.plugin import UsageTab
from tests.usage_tab.chromium import CHROMIUM, Chromium
from tests.usage_tab.counted import drawn, write_counted

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
WIDTHS = (390, 1280)
"""Pixels of a phone and of a desktop."""
EXPERTS = [Layer("experts", 16, 2)] * 3
CODES = [Layer("codes", 2_000, 1)]
HOSTILE = "<img src=x onerror=alert(1)>"
ARMS = ("base", "mapped", HOSTILE)
SEEN = """(() => {
  const box = (one) => one.getBoundingClientRect();
  const name = (one) => `${one.tagName} ${one.textContent.trim().slice(0, 60)}`;
  const apart = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) < 2
    || Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) < 5;
  const wide = [...document.querySelectorAll('main *')].filter((one) =>
    !one.closest('.table-scroll *, .heat-scroll *') && box(one).right > window.innerWidth + 1);
  const cut = [], overlapping = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')], frame = box(svg);
    cut.push(...texts.filter((one) => box(one).left < frame.left - 1
      || box(one).right > frame.right + 1 || box(one).bottom > frame.bottom + 3).map(name));
    texts.forEach((a, i) => texts.slice(i + 1).forEach((b) => {
      if (!apart(box(a), box(b))) overlapping.push(`${name(a)} | ${name(b)}`);
    }));
  }
  const unnamed = [...document.querySelectorAll('button, input, select, canvas, svg[role], .curve')]
    .filter((one) => !one.getAttribute('aria-label') && !one.labels?.length
      && !one.textContent.trim()).map(name);
  return { wide: wide.map(name), cut, overlapping, unnamed, page: document.body.scrollWidth };
})()"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arms of two seeds, one of a hostile name, and a codebook."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("runs")
    for i, arm in enumerate(ARMS):
        for seed in range(2):
            run = folder / f"sweep/experts/arm{i}/seed{seed}"
            write_counted(run, EXPERTS, drawn(rng, EXPERTS, 9), arm=arm, seed=seed)
    write_counted(folder / "sweep/codes", CODES, drawn(rng, CODES, 3), arm="vq", seed=0)
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    application = TensorBoardWSGI([UsageTab(TBContext(logdir=str(runs)))])
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/data/plugin_entry.html?name=usage"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def page(chromium: Chromium) -> Iterator[Chromium]:
    """The browser, which must not complain."""
    chromium.complaints.clear()
    yield chromium
    assert [one for one in chromium.complaints if "favicon.ico" not in one] == []


def show(page: Chromium, address: str, run: str, *, width: int = 1280, dark: bool = False) -> None:
    """Open the page, and the run on it."""
    page.open(address, width=width, dark=dark)
    page.until("document.querySelectorAll('#run option').length > 6")
    page.read(
        f"(() => {{ const one = document.querySelector('#run'); one.value = '{run}';"
        " one.dispatchEvent(new Event('change')); })()"
    )
    page.until(f"document.querySelector('main').dataset.run === '{run}'")
    page.until("document.querySelectorAll('.over figure').length >= 3")


SLOW_WINDOWS = """(() => {
  const asked = window.fetch;
  window.held = [];
  window.fetch = (address, ...rest) => address.includes('/window?')
    ? new Promise((free) => window.held.push(free)).then(() => asked(address, ...rest))
    : asked(address, ...rest);
})()"""
"""Counts of a window are answered once the test frees them."""


def go(page: Chromium, index: int, step: int) -> None:
    """Move the slider to a window."""
    page.read(
        f"(() => {{ const one = document.querySelector('.timeline input'); one.value = {index};"
        " one.dispatchEvent(new Event('input')); })()"
    )
    page.until(f"document.querySelector('.heat-readout').textContent.endsWith('at step {step}')")


def table(page: Chromium) -> list[list[int]]:
    """The counts that the page shows as a table, without the layers' names."""
    page.read("document.querySelector('details').open = true")
    page.until("document.querySelector('table.counts') !== null")
    return page.read(
        "[...document.querySelectorAll('table.counts tbody tr')].map((row) =>"
        " [...row.querySelectorAll('td')].map((cell) => Number(cell.textContent)))"
    )


def texts(page: Chromium, selector: str) -> list[str]:
    return page.read(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")


def test_numbers_of_the_page_are_those_of_usage_npz(
    page: Chromium, address: str, runs: Path
) -> None:
    saved = np.load(runs / "sweep/experts/arm0/seed0/usage.npz")
    show(page, address, "sweep/experts/arm0/seed0")
    assert texts(page, ".step") == ["step 90 of 90"]
    for index in (8, 3):
        go(page, index, int(saved["steps"][index]))
        counts = saved["counts"][index]
        assert table(page) == counts.tolist()
        measured = [usage(n) for n in counts]
        used, entropy, max_vio, dead, starved = texts(page, ".tile-value")
        assert float(used.rstrip("%")) == pytest.approx(
            100 * np.mean([one.used for one in measured]), abs=0.051
        )
        assert float(entropy) == pytest.approx(np.mean([one.entropy for one in measured]), rel=6e-3)
        assert float(max_vio) == pytest.approx(np.mean([one.max_vio for one in measured]), rel=6e-3)
        assert int(dead) == (counts == 0).sum()
        assert int(dead) + int(starved) == (counts < 0.1 * counts.mean(1, keepdims=True)).sum()
    page.read("document.querySelectorAll('[name=counted]')[1].click()")
    # from step 40 on the next evaluation
    page.until("document.querySelector('.step').textContent === 'step 60 of 90'")
    held_out = saved["val_counts"][1].tolist()
    page.until(
        "document.querySelector('table.counts td').textContent === '" + str(held_out[0][0]) + "'"
    )
    assert table(page) == held_out


def test_dead_slots_stand_by_name_with_the_step_since_when(
    page: Chromium, address: str, runs: Path
) -> None:
    saved = np.load(runs / "sweep/experts/arm0/seed0/usage.npz")
    show(page, address, "sweep/experts/arm0/seed0")
    rows = page.read(
        "[...document.querySelectorAll('table.sick tbody tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )
    named: dict[tuple[str, int], str] = {}
    for layer, state, since, _, _, ids in rows:
        for part in ids.split(", ") if state == "dead" else []:
            first, _, last = part.partition("-")
            named |= {(layer, i): since for i in range(int(first), int(last or first) + 1)}
    expected = {}
    for layer, slot in np.argwhere(saved["counts"][-1] == 0):
        drawn_at = np.flatnonzero(saved["counts"][:, layer, slot])
        since = str(saved["steps"][drawn_at[-1]]) if len(drawn_at) else "the start"
        expected[f"moe/{layer:02d}", int(slot)] = since
    assert named == expected


def test_keys_go_through_the_cells_and_enter_shows_one_over_time(
    page: Chromium, address: str, runs: Path
) -> None:
    counts = np.load(runs / "sweep/experts/arm0/seed0/usage.npz")["counts"][-1]
    show(page, address, "sweep/experts/arm0/seed0")
    page.read("document.querySelector('canvas').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    (said,) = texts(page, ".heat-readout")
    assert said.startswith("moe/01, expert 2: load ")
    assert f", {counts[1, 2]} draws" in said
    page.press("Enter")
    page.until("!document.querySelector('.slot').hidden")
    assert texts(page, ".slot h2") == ["moe/01, expert 2"]
    page.read("document.querySelector('.slot button').click()")
    page.until("document.querySelector('.slot').hidden")
    # sorted, the first cell of a row is the layer's most used expert
    page.read("document.querySelector('.sort input').click()")
    page.read("document.querySelector('canvas').focus()")
    page.press("Home")
    (said,) = texts(page, ".heat-readout")
    assert said.startswith(f"moe/01, expert {counts[1].argmax()}: ")


def test_nothing_is_told_of_a_run_whose_counts_have_not_come(
    page: Chromium, address: str, runs: Path
) -> None:
    show(page, address, "sweep/codes")
    page.read(SLOW_WINDOWS)
    page.read(
        "(() => { const one = document.querySelector('#run');"
        " one.value = 'sweep/experts/arm0/seed0'; one.dispatchEvent(new Event('change')); })()"
    )
    page.until("document.querySelector('.card h2').textContent === 'Experts'")
    page.until("window.held.length === 1")
    page.read("document.querySelector('canvas').focus()")
    page.press("ArrowRight")
    page.press("Enter")
    page.read("document.querySelector('.sort input').click()")
    page.read("document.querySelector('details').open = true")
    assert texts(page, ".heat-readout") == [""]
    assert page.read("document.querySelector('.slot').hidden")
    # what hung below was the run before
    assert page.read("document.querySelectorAll('.over figure').length") == 0
    page.read("window.held.forEach((free) => free())")
    page.until("document.querySelectorAll('.over figure').length >= 3")
    (said,) = texts(page, ".heat-readout")
    counts = np.load(runs / "sweep/experts/arm0/seed0/usage.npz")["counts"][-1]
    # sorted meanwhile
    assert said.startswith(f"moe/00, expert {counts[0].argmax()}: load ")


def test_a_click_on_a_cell_shows_it_and_white_is_the_fair_share(
    page: Chromium, address: str, runs: Path
) -> None:
    even = [[np.array([8, 8, 8, 8]), np.array([0, 16, 8, 8])]]
    write_counted(runs / "even", [Layer("experts", 4, 1)] * 2, even)
    show(page, address, "even")
    left, top, width, height = page.read(
        "(() => { const one = document.querySelector('canvas').getBoundingClientRect();"
        " return [one.left, one.top, one.width, one.height]; })()"
    )
    colours = page.read(
        "(() => { const pen = document.querySelector('canvas').getContext('2d');"
        f" const at = (row, slot) => [...pen.getImageData({width} * (slot + 0.25) / 4,"
        f" {height} * (row + 0.25) / 2, 1, 1).data.slice(0, 3)];"
        " return [at(0, 0), at(0, 3), at(1, 0), at(1, 1), at(1, 2)]; })()"
    )
    white = [255, 255, 255]
    assert colours[0] == colours[1] == colours[4] == white
    assert colours[2] == [0, 0, 0]
    assert colours[3][0] > colours[3][2] + 30  # red is above
    page.click(left + width * 0.3, top + height * 0.75)
    page.until("!document.querySelector('.slot').hidden")
    assert texts(page, ".slot h2") == ["moe/01, expert 1"]


def test_play_runs_to_the_last_step(page: Chromium, address: str) -> None:
    show(page, address, "sweep/experts/arm0/seed0")
    page.read("document.querySelector('.play').click()")
    page.until("document.querySelector('.step').textContent === 'step 20 of 90'")
    page.until("document.querySelector('.step').textContent === 'step 90 of 90'")
    page.until("document.querySelector('.play').getAttribute('aria-label') === 'Play'")


def test_codes_are_a_curve_with_the_dead_counted(page: Chromium, address: str, runs: Path) -> None:
    counts = np.load(runs / "sweep/codes/usage.npz")["counts"][-1, 0]
    show(page, address, "sweep/codes")
    assert texts(page, ".legend span") == [f"codes: {(counts == 0).sum():,} of 2,000 codes dead"]
    page.read("document.querySelector('.curve').focus()")
    page.press("Home")
    (said,) = texts(page, ".heat-readout")
    assert said.startswith(f"codes, code {counts.argmax()}, rank 0: ")
    assert f" {counts.max()} draws" in said


def test_arms_stand_side_by_side_and_names_are_text(page: Chromium, address: str) -> None:
    show(page, address, "sweep/experts/arm1/seed1")
    page.until("document.querySelectorAll('.arms figure').length === 3")
    assert texts(page, ".arms figcaption button") == list(ARMS)
    assert texts(page, ".arms figcaption span") == ["2 seeds"] * 3
    assert page.read("document.querySelectorAll('.arms .band').length") == 3
    assert page.read("document.images.length") == 0


@pytest.mark.parametrize("run", ["sweep/experts/arm0/seed0", "sweep/codes"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_or_overlaps_and_everything_has_a_name(
    page: Chromium, address: str, run: str, width: int, dark: bool
) -> None:
    show(page, address, run, width=width, dark=dark)
    page.read("document.querySelector('canvas, .curve').focus()")
    page.press("ArrowRight")
    page.press("Enter")
    page.until("!document.querySelector('.slot').hidden")
    seen: dict[str, Any] = page.read(SEEN)
    assert seen.pop("page") <= width
    assert seen == {"wide": [], "cut": [], "overlapping": [], "unnamed": []}
    assert page.read("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.read("document.documentElement.lang") == "en"


def test_a_run_that_goes_on_moves_on_by_itself(page: Chromium, address: str, runs: Path) -> None:
    rng = np.random.default_rng(1)
    run = write_counted(runs / "going", EXPERTS, drawn(rng, EXPERTS, 3), status="running")
    show(page, address, "going")
    page.until("document.querySelector('.step').textContent === 'step 30 of 30'")
    saved = dict(np.load(run / "usage.npz"))
    saved["steps"] = np.append(saved["steps"], 40)
    saved["counts"] = np.append(saved["counts"], saved["counts"][:1], axis=0)
    np.savez(run / "new.npz", **saved)
    os.replace(run / "new.npz", run / "usage.npz")
    page.until("document.querySelector('.step').textContent === 'step 40 of 40'")
    page.until("document.querySelector('.heat-readout').textContent.endsWith('at step 40')")
    assert table(page) == saved["counts"][-1].tolist()
