"""Texts of a column: parquet files, and the Arrow files of data sets that were saved to disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simvq_moe.data.rows import base
from simvq_moe.data.rows.base import BUFFER, Defect, Row, Rows, decoded, defect_of, missing

ROWS_AT_A_TIME = 1024
"""Rows of a parquet file that are read at once."""


def read_parquet(path: Path, rows: Rows) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            metadata = file.metadata
            problem = _column_problem(str(path), file.schema_arrow, rows.field)
        if problem is not None:
            yield 0, problem
            return
        # as a dictionary a text that a small file repeats a million times is held once
        options = {"read_dictionary": [rows.field], "buffer_size": BUFFER, "metadata": metadata}
        with ParquetFile(path, **options) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= rows.first:
                    row += size
                    continue
                for batch in file.iter_batches(ROWS_AT_A_TIME, [group], [rows.field]):
                    yield from _texts_of_column(path, batch.column(0), row, rows)
                    row += len(batch)
    except (ArrowException, OSError) as error:
        yield row, defect_of(path, f"from row {row} on", error)


def read_arrow(path: Path, rows: Rows) -> Iterator[Row]:
    """A file of a saved data set, which is a stream of batches."""
    from pyarrow import ArrowException, OSFile, ipc

    row = 0
    try:
        with OSFile(str(path)) as file, ipc.open_stream(file) as batches:
            problem = _column_problem(str(path), batches.schema, rows.field)
            if problem is not None:
                yield 0, problem
                return
            for batch in batches:
                batch.validate(full=True)  # offsets of a stranger may point anywhere
                if row + len(batch) > rows.first:
                    yield from _texts_of_column(path, batch.column(rows.field), row, rows)
                row += len(batch)
    except (ArrowException, OSError) as error:
        yield row, defect_of(path, f"from row {row} on", error)


def _column_problem(path: str, schema: Any, field: str) -> Defect | None:
    from pyarrow import types

    if schema.names.count(field) != 1:
        return Defect(path, missing("column", field, schema.names), of_another_kind=True)
    kind = schema.types[schema.names.index(field)]
    values = kind.value_type if types.is_dictionary(kind) else kind
    texts = (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view),
    )
    if any(is_kind(values) for is_kind in texts) or types.is_null(values):
        return None
    return Defect(path, f"column {field!r} holds {kind}, no strings")


def _texts_of_column(path: Path, column: Any, first: int, rows: Rows) -> Iterator[Row]:
    """Texts of a dictionary of strings or bytes (Spark writes texts as bytes), or of strings."""
    from pyarrow import DictionaryArray

    if column.null_count == len(column):  # also of the type null, whose values have no bytes
        return
    coded = isinstance(column, DictionaryArray)
    values = column.dictionary if coded else column
    places = column.indices.to_pylist() if coded else range(len(column))
    for row, place in enumerate(places, first):
        value = values[place].as_buffer() if row in rows and place is not None else None
        if value is None or not value.size:
            continue
        where = f"{path} row {row}"
        if value.size > base.LARGEST_ROW:
            yield row, Defect(where, f"more than {base.LARGEST_ROW:,} bytes")
        else:
            yield row, decoded(value.to_pybytes(), where)
