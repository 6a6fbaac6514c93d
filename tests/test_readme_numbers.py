"""Numbers of the README and of the results page are those of report.json, rounded once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from simvq_moe.analysis import stats
from tests.launching import ROOT

BYTES, ENTROPY, USED = "val/bits_per_byte", "val/moe/mean/entropy", "val/codes/used"
MEL, SI_SDR, MSE, PERPLEXITY = "val/mel_distance", "val/si_sdr", "val/mse", "val/codes/perplexity"
EXPERTS = ("moe", "experts")
WHITENING = ("whitening", "experts")
EXPONENT = ("exponent", "experts")
MUON = ("muon", "experts")
EQUAL = ("equal_terms", "experts")
SELVES = ("self_selecting", "self_selecting")
FEW, MANY = ("codes_tuned", "codes_512"), ("codes_tuned", "codes_8192")
IN_THE_TABLE = {
    "expert_out": "shared map after the experts",
    "expert_out_separate": "one map for each expert (control)",
    "router_map": "router Q W, frozen Q, m = 64",
    "slow_router": "router learning rate x 0.1 (control)",
    "frozen_router": "router never trained (control)",
    "centred": "centred router input (control)",
    "aux": "load-balance loss 0.01",
    "loss_free": "loss-free bias",
}
WHITENED = {
    "centred": "centred router input (control)",
    "slow_router": "router learning rate x 0.1 (control)",
    "diagonal": "whitened by each channel's variance (control)",
    "whitened": "**whitened router input**",
    "whitened_frozen": "whitened router input, rows frozen",
    "aux_weak": "load-balance loss 0.003",
    "aux": "load-balance loss 0.01",
    "aux_strong": "load-balance loss 0.03",
    "loss_free_slow": "loss-free bias, rate 0.0003",
    "loss_free": "loss-free bias, rate 0.001",
    "loss_free_fast": "loss-free bias, rate 0.003",
}
CODES = {
    "vq": "VQ",
    "ema": "EMA-VQ",
    "vq_width_4": "VQ at width 4 (control)",
    "fsq": "FSQ",
    "simvq": "SimVQ",
    "simvq_data": "SimVQ started from data",
    "simvq_both": "SimVQ, W and rows learned",
    "simvq_diagonal": "SimVQ, diagonal W",
    "bias_only": "bias only, no W (control)",
}
QUICKSTART = {
    ("codes", ".4", MSE, "codes"): {
        "vq": "VQ",
        "ema": "EMA-VQ",
        "ema_restart": "EMA-VQ with restarts",
        "simvq": "SimVQ",
        "vq_width_4": "VQ at width 4 (control)",
    },
    ("experts", ".3", BYTES, "moe/mean"): {
        "base": "plain MoE",
        "aux": "load-balance loss 0.01",
        "expert_out": "shared map after the experts",
        "whitened": "whitened router input",
        "router_map": "router Q W, frozen Q",
        "slow_router": "router learning rate x 0.1 (control)",
    },
}
"""The group, digits and name of its error, where its usage is recorded, and its arms."""
EXPONENTS = {
    "p_minus_1": "p = -1, the map of codes",
    "p_025": "p = 0.25",
    "p_05": "p = 0.5",
    "p_075": "p = 0.75",
    "p_1": "**p = 1, whitened**",
}
MUONS = {
    "muon": "Muon on the router",
    "whitened": "whitened router input, AdamW (control)",
}
EQUALS = {
    "expert_out": "**shared map after the experts**",
    "expert_out_separate": "one map for each expert (control)",
    "expert_out_fast": "shared map at five times the learning rate",
}
TUNED = {
    "ema_restart": "EMA-VQ with restarts",
    "vq": "VQ",
    "vq_restart": "VQ with restarts",
    "ema": "EMA-VQ",
    "ema_kmeans": "EMA-VQ with restarts and a k-means start",
    "vq_width_4": "VQ at width 4 (control)",
    "fsq": "FSQ",
    "group_vq": "Group-VQ, 8 maps",
    "simvq": "SimVQ",
    "simvq_bias": "SimVQ, W and a bias",
    "simvq_data": "**SimVQ started from data**",
    "running_map": "W at running moments, nothing learned (control)",
    "ns_vq": "NS-VQ, idle codes pulled along",
    "noise": "NSVQ, noise for the error, with restarts",
}
TABLES = (
    (EQUAL, "base", EQUALS),
    (EXPERTS, "base", IN_THE_TABLE),
    (WHITENING, "base", WHITENED),
    (EXPONENT, "p_0", EXPONENTS),
    (MUON, "base", MUONS),
)
POINTS = "{mean:.1f} {of} ({low:.1f} to {high:.1f}, {agree} of {n} pairs, p {p:.2f})"
SPREAD = "{mean:+.3f} ({low:+.3f} to {high:+.3f}, {agree} of {n} pairs"
RANGE = "({low:+.3f} to {high:+.3f}"
SENTENCES: tuple[tuple[tuple[str, str], str, str, str, str], ...] = (
    (("codes", "codes_512"), "simvq", "vq", USED, POINTS.replace("{of}", "points of 512")),
    (("codes", "codes_2048"), "simvq", "vq", USED, POINTS.replace("{of}", "of 2,048")),
    (("speech", "prompts_512"), "simvq", "vq", USED, "+" + POINTS.replace("{of}", "points")),
    (("speech", "speech_512"), "simvq", "vq", USED, "+" + POINTS.replace("{of}", "points")),
    (
        ("speech", "prompts_512"),
        "simvq",
        "vq",
        SI_SDR,
        "{mean:+.1f} dB ({low:+.1f} to {high:+.1f})",
    ),
    (("speech", "prompts_512"), "simvq", "vq", MEL, "mel distance {mean:+.3f} " + RANGE),
    (("speech", "speech_512"), "simvq", "vq", MEL, "mel distance {mean:+.3f} " + RANGE),
    (
        EXPERTS,
        "expert_out",
        "base",
        ENTROPY,
        "{mean:+.3f} with the map " + RANGE + ", higher in {agree} of",
    ),
    (
        EXPERTS,
        "expert_out",
        "expert_out_separate",
        ENTROPY,
        "{mean:.3f} above one map for each " + RANGE,
    ),
    (
        WHITENING,
        "whitened",
        "centred",
        ENTROPY,
        "{mean:.3f} over a centred one ({low:.3f} to {high:.3f}, {agree} of {n} pairs)",
    ),
    (
        WHITENING,
        "whitened",
        "centred",
        ENTROPY,
        "entropy {mean:+.3f} over the centred router "
        "({low:+.3f} to {high:+.3f}, {agree} of {n} pairs, p {p:.4f}; P8)",
    ),
    (
        WHITENING,
        "whitened",
        "loss_free",
        BYTES,
        "{mean:+.4f} bits per byte beside that of the best of six balancers, a loss-free bias of "
        "rate 0.001 ({low:+.4f} to {high:+.4f}, lower in {agree} of {n} pairs)",
    ),
    (WHITENING, "base", "whitened", BYTES, "{mean:.3f} beside plain MoE ({low:.3f} to {high:.3f}"),
    (
        EXPONENT,
        "p_1",
        "p_0",
        ENTROPY,
        "{mean:+.3f} at p = 1 over p = 0 "
        "({low:+.3f} to {high:+.3f}, {agree} of {n} pairs, p {p:.2f})",
    ),
    (EXPONENT, "p_1", "p_075", BYTES, "p = 1 not apart: bits per byte {mean:+.3f} " + RANGE),
    (
        MUON,
        "muon",
        "base",
        ENTROPY,
        "{mean:+.3f} with Muon over AdamW "
        "({low:+.3f} to {high:+.3f}, {agree} of {n} pairs, p {p:.2f})",
    ),
    (MUON, "whitened", "muon", ENTROPY, "stays {mean:.3f} above Muon " + RANGE),
    (MUON, "whitened", "muon", BYTES, "at bits per byte {mean:+.3f} " + RANGE),
    (EXPERTS, "expert_out", "base", ENTROPY, "by at most {high:+.3f}; in another"),
    (EXPERTS, "expert_out", "base", ENTROPY, "(entropy {mean:+.3f}), and evened it out"),
    (EXPERTS, "router_map", "base", ENTROPY, "`Q W` gains {mean:+.3f} of entropy at a higher"),
    (EXPERTS, "slow_router", "base", ENTROPY, "ten times more slowly gains {mean:+.3f},"),
    (EXPERTS, "aux", "base", ENTROPY, "a load-balance loss {mean:+.3f} and a loss-free"),
    (EXPERTS, "loss_free", "base", ENTROPY, "a loss-free bias {mean:+.3f}, both"),
    (
        EXPERTS,
        "expert_out",
        "expert_out_separate",
        ENTROPY,
        "{mean:.3f} above one map for each in the first study",
    ),
    (EQUAL, "expert_out", "base", ENTROPY, "in another it gained {mean:+.3f}, and one map"),
    (EQUAL, "expert_out_separate", "base", ENTROPY, "one map for each expert {mean:+.3f}. -"),
    (
        EQUAL,
        "expert_out",
        "base",
        ENTROPY,
        "{mean:+.3f} with the map ({low:+.3f} to {high:+.3f}, {agree} of {n} pairs, p {p:.4f})",
    ),
    (EQUAL, "expert_out", "base", ENTROPY, "gained {mean:.3f} (eight pairs, " + RANGE[1:]),
    (EQUAL, "expert_out_separate", "base", ENTROPY, "one map for each expert {mean:.3f}."),
    (
        EQUAL,
        "expert_out_separate",
        "expert_out",
        ENTROPY,
        "and {mean:.3f} below it in the second",
    ),
    (
        EQUAL,
        "expert_out_separate",
        "expert_out",
        ENTROPY,
        "{mean:.3f} below one map for each (-{high:.3f} to -{low:.3f}, {agree} of {n} pairs)",
    ),
    *(
        (
            codes,
            "simvq_data",
            "ema_restart",
            MSE,
            "codes MSE {mean:+.4f} ({low:+.4f} to {high:+.4f}, "
            "higher in {agree} of {n} pairs, p {p:.2f})",
        )
        for codes in (FEW, MANY)
    ),
    (FEW, "simvq_data", "ema_restart", MSE, "(MSE {mean:+.4f}, {low:+.4f} to {high:+.4f} with 512"),
    (FEW, "ema_restart", "simvq_data", PERPLEXITY, "lower by {mean:.0f} ({low:.0f} to {high:.0f})"),
    (
        MANY,
        "ema_restart",
        "simvq_data",
        PERPLEXITY,
        "by {mean:.0f} ({low:.0f} to {high:.0f}), in all",
    ),
    (
        FEW,
        "simvq",
        "vq",
        USED,
        "{mean:.1f} points more of the 512 codes than VQ "
        "({low:.1f} to {high:.1f}, {agree} of {n} pairs)",
    ),
    *(
        (FEW, worse, better, MSE, words + " ({low:.4f} to {high:.4f}, {agree} of {n} pairs)")
        for worse, better, words in (
            ("simvq", "vq_restart", "than SimVQ's by {mean:.4f}"),
            ("running_map", "simvq_data", "by {mean:.4f} from data"),
            ("ema_restart", "noise", "{mean:.4f} below EMA with restarts"),
        )
    ),
    (SELVES, "map_learned", "learned", ENTROPY, "entropy {mean:+.3f} with the map " + RANGE),
    (SELVES, "map_learned", "learned", BYTES, "bits per byte " + SPREAD),
    (SELVES, "map_frozen", "frozen", ENTROPY, "{mean:+.3f} " + RANGE),
    (SELVES, "map_slow", "slow", ENTROPY, "{mean:+.3f} " + RANGE + "), {agree} of {n} pairs both"),
    (SELVES, "map_data", "learned", ENTROPY, "({mean:+.3f}, {low:+.3f} to {high:+.3f})"),
    (SELVES, "slow", "learned", ENTROPY, "Slow keys alone give {mean:+.3f}"),
    (SELVES, "frozen", "learned", ENTROPY, "frozen ones {mean:+.3f}"),
    (SELVES, "aux", "learned", ENTROPY, "the load-balance loss {mean:+.3f}"),
)


@cache
def group_of(study: str, group: str) -> dict[str, Any]:
    report = json.loads((ROOT / "docs" / "results" / study / "report.json").read_text())
    return next(one for one in report["groups"] if one["name"] == group)


def values(where: tuple[str, str], arm: str, metric: str) -> np.ndarray:
    found = next(one for one in group_of(*where)["arms"] if one["name"] == arm)
    return np.array(found["values"][metric]) * (100 if metric == USED else 1)


def compared(where: tuple[str, str], arm: str, other: str, metric: str) -> dict[str, float]:
    differences = values(where, arm, metric) - values(where, other, metric)
    found = stats.compare(differences.tolist())
    assert found.interval is not None
    assert found.p is not None
    agree = int((differences * found.mean > 0).sum())
    low, high = found.interval
    return {
        "mean": found.mean,
        "low": low,
        "high": high,
        "agree": agree,
        "n": found.n,
        "p": found.p,
    }


@pytest.fixture(scope="module")
def readme() -> str:
    pages = (ROOT / "README.md", ROOT / "docs/results/index.md")
    return " ".join(" ".join(page.read_text() for page in pages).split())


@pytest.mark.parametrize(("where", "arm", "other", "metric", "words"), SENTENCES)
def test_differences_in_sentences_are_those_of_the_report(
    readme: str, where: tuple[str, str], arm: str, other: str, metric: str, words: str
) -> None:
    expected = words.format(**compared(where, arm, other, metric))
    assert expected in readme


@pytest.mark.parametrize(
    ("where", "baseline", "arm", "label"),
    [(where, baseline, *row) for where, baseline, rows in TABLES for row in rows.items()],
)
def test_tables_of_differences_are_those_of_the_reports(
    readme: str, where: tuple[str, str], baseline: str, arm: str, label: str
) -> None:
    cell = "{mean:+.3f} ({low:+.3f}, {high:+.3f})"
    cells = [cell.format(**compared(where, arm, baseline, metric)) for metric in (BYTES, ENTROPY)]
    assert f"| {label} | {' | '.join(cells)} |" in readme


def test_the_shares_in_use_on_equal_terms_are_those_of_the_report(readme: str) -> None:
    used = "val/moe/mean/used"
    means = [100 * float(values(EQUAL, arm, used).mean()) for arm in ("expert_out", "base")]
    with_map, without = means
    assert f"{with_map:.0f} % of them in use with the map and {without:.0f} % without" in readme
    assert f"{with_map:.0f} % of the experts are in use with the map and {without:.0f} %" in readme


def test_the_expected_use_of_the_image_recipe_is_that_of_the_quickstart() -> None:
    low, high = values(("quickstart", "codes"), "simvq", USED)
    header = (ROOT / "configs" / "image_quickstart.yaml").read_text()
    assert f"{low:.0f} to {high:.0f} % of the codes used (seeds 0 and 1, two ranks)" in header


@pytest.mark.parametrize("arm", CODES)
def test_the_table_of_codes_is_that_of_the_report(readme: str, arm: str) -> None:
    cells = []
    for group in ("codes_512", "codes_2048"):
        for metric, digits, unit in ((MSE, 4, ""), (USED, 0, " %"), (PERPLEXITY, 0, "")):
            mean, sd = stats.mean_sd(values(("codes", group), arm, metric).tolist())
            cells.append(f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}")
    assert f"| {CODES[arm]} | {' | '.join(cells)} |" in readme


@pytest.mark.parametrize("arm", TUNED)
def test_the_table_of_tuned_codes_is_that_of_the_report(readme: str, arm: str) -> None:
    cells = []
    for metric, digits, unit in ((MSE, 4, ""), (USED, 0, " %"), (PERPLEXITY, 0, "")):
        mean, sd = stats.mean_sd(values(FEW, arm, metric).tolist())
        cells.append(f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}")
    other = compared(FEW, arm, "ema_restart", MSE) if arm != "ema_restart" else None
    cells.append("{mean:+.4f} ({low:+.4f}, {high:+.4f})".format(**other) if other else "0")
    assert f"| {TUNED[arm]} | {' | '.join(cells)} |" in readme


def test_the_shares_in_use_at_tuned_rates_are_those_of_the_report(readme: str) -> None:
    arms = ("simvq", "vq", "vq_restart", "ema_restart")
    simvq, vq, restarted, moved = (float(values(FEW, arm, USED).mean()) for arm in arms)
    assert f"SimVQ uses {simvq:.0f} % of 512 codes and VQ {vq:.0f} %; VQ with" in readme
    assert f"codes uses {restarted:.0f} %, and EMA with restarts {moved:.0f} %" in readme


@pytest.mark.parametrize(
    ("group", "arm", "label"),
    [(group, *row) for group, rows in QUICKSTART.items() for row in rows.items()],
)
def test_the_table_of_the_quickstart_is_that_of_its_report(
    group: tuple[str, str, str, str], arm: str, label: str
) -> None:
    name, digits, error, usage = group
    where = ("quickstart", name)

    def mean(measure: str) -> float:
        found = next(one for one in group_of(*where)["arms"] if one["name"] == arm)
        return float(np.mean(found["values"][measure]))

    of_usage = (f"val/{usage}/{one}" for one in ("used", "perplexity", "entropy", "max_vio"))
    used, perplexity, entropy, max_vio = map(mean, of_usage)
    cells = [f"{mean(error):{digits}f}", f"{used:.0%}".replace("%", " %"), f"{perplexity:.0f}"]
    cells += [f"{entropy:.2f}", f"{max_vio:.1f}"]
    plain = (ROOT / "README.md").read_text().replace("**", "")
    assert f"| {label} | {' | '.join(cells)} |" in plain
