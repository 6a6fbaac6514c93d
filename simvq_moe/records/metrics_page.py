"""docs/metrics.md, which is the catalogue as a page: python -m simvq_moe.records.metrics_page."""

from __future__ import annotations

from simvq_moe.records.catalogue import SECTIONS
from simvq_moe.records.metric import Metric
from simvq_moe.text_table import markdown

HEAD = """# Metrics

What a run logs in metrics.jsonl and summary.json. Written from the catalogue in
`simvq_moe/records/` by `python -m simvq_moe.records.metrics_page > docs/metrics.md`.

In names, `[val/]` is the whole held-out set, and the window of training since the last logged step
without it; `{slots}` is one codebook `codes`, a numbered one, a MoE layer `moe/00`, after a
capacity `moe_kept/00`, or the mean of all `moe/mean`; `{kind}` is `codes`, `moe` or `moe_kept`;
`{layer}` is a number or `mean`; `{bank}` is a number that meta.json names; `/{step}` is a step;
`{task}` is a task of lm-eval, as `eval --tasks` adds it to summary.json, and `{measure}` is a
measure of it.
"""


def page() -> str:
    """The whole page, a table a section."""
    parts = [HEAD]
    for title, metrics in SECTIONS.items():
        rows = [["name", "unit", "better", "what it is"], *map(_row, metrics)]
        parts.append(f"## {title}\n\n{markdown(rows)}\n")
    return "\n".join(parts)


def _row(one: Metric) -> list[str]:
    return [f"`{one.name}`", one.unit, one.better or "", one.meaning]


if __name__ == "__main__":
    print(page(), end="")
