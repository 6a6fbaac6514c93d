"""Whether what a page prints stands in report.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from simvq_moe.records.catalogue import METRICS


def numbers(content: Any) -> Iterator[float]:
    """Every number in plain containers."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from numbers(part)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


def words(content: dict[str, Any]) -> list[str]:
    """Names and sentences written by people, which may hold numbers of their own."""
    found = [content["title"], *(one.meaning for one in METRICS)]
    for group in content["groups"]:
        found += [group["name"], group["question"], group["notes"], group["config"]]
        found += [arm["label"] for arm in group["arms"]]
        found += [domain for one in group["routings"] for domain in one["domains"]]
    for one in content["predictions"]:
        found += [one["name"], one["statement"], one["rule"], one["needs"]]
    return sorted((word for word in found if word), key=len, reverse=True)


def missing(texts: Iterable[str], content: dict[str, Any]) -> tuple[list[str], int]:
    """Printed numbers that no number of report.json rounds to, and how many were printed."""
    known = np.array(list(numbers(content)))
    by_people = words(content)
    absent, printed = [], 0
    for text in texts:
        rest = " ".join(text.split())
        for word in by_people:
            rest = rest.replace(word, " ")
        # names of statistics, and what is only bounded
        rest = re.sub(r"p₁|p₂|CV²|0\.0001", " ", rest.replace("\u00a0", " "))
        for token in re.findall(r"[−\d][\d,.]*\d|\d", rest):
            plain = token.replace("−", "-").replace(",", "")
            half = 0.5 * 10.0 ** -len(plain.partition(".")[2]) + 1e-9
            values = np.concatenate([known, 100 * known])  # shares are printed in percent
            printed += 1
            # a relative change may be printed without its sign, in words
            if not (np.abs(np.abs(values) - abs(float(plain))) <= half).any():
                absent.append(f"{token} in {text[:200]!r}")
    return absent, printed
