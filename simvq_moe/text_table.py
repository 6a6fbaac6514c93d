"""Tables as text: Markdown with aligned columns, or plain columns for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A Markdown table whose columns also align as text.

    Args:
        rows: the header and the rows, as long as each other.
        right: columns that align to the right.
    """
    widths = [max(3, width) for width in _widths(rows)]
    rule = ["-" * (w - (i in right)) + ":" * (i in right) for i, w in enumerate(widths)]
    lines = [_padded(line, widths, right) for line in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Columns that align to the right, two spaces apart."""
    widths = _widths(rows)
    return "\n".join("  ".join(_padded(line, widths, range(len(line)))) for line in rows)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _padded(line: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    cells = enumerate(zip(line, widths, strict=True))
    return [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in cells]
