"""Tables and facts in folders that anybody may have changed: read in bounded memory."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrace.traces.storage.regular import open_regular

FACTS_BYTES = 1 << 26
"""Of a file of facts; those of a run with hundreds of methods take less than a hundredth."""
CODECS = {"SNAPPY", "UNCOMPRESSED"}
"""How tables are written: they unpack to at most 22 times their bytes, others to anything."""
ENCODINGS = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "BIT_PACKED"}
"""Likewise; of others, each value may repeat the one before at no cost."""
ROWS, TEXT = 1 << 20, 1 << 24
"""Rows and bytes of text that any table may have."""
ROWS_PER_BYTE, TEXT_PER_BYTE = 16, 1 << 10
"""And those besides for each of its file's bytes. Values that repeat cost nothing, but figures
differ: of tables of results one byte stands for less than a row."""

TEXTS = (pa.types.is_string, pa.types.is_large_string)
KINDS = (
    *TEXTS,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_null,
)
"""What columns hold; besides, categories of text."""


def read_table(file: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A Parquet table, or these of its columns.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, lacks a column, or claims more than its file can hold.
    """
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            texts = _check(pq.read_metadata(opened), size, columns)
            # Texts stay numbers until it is known what they come to.
            with pq.ParquetFile(opened, read_dictionary=texts) as held:
                table = held.read(columns=columns)
        table.validate(full=True)  # texts are UTF-8, which is found out when they are first shown
        if sum(_text_bytes(table[name]) for name in texts) > TEXT + TEXT_PER_BYTE * size:
            raise ValueError(f"the texts of {file.name} are larger than such a file can hold")
        plain = [f.with_type(pa.large_string()) if f.name in texts else f for f in table.schema]
        frame: pd.DataFrame = table.cast(pa.schema(plain)).to_pandas(ignore_metadata=True)
        return frame
    except (pa.ArrowException, MemoryError, RuntimeError) as error:
        raise ValueError(f"{file.name} is no table: {error}") from error


def read_facts(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, is none, or too large for one.
    """
    with open_regular(file) as opened:
        raw = opened.read(FACTS_BYTES + 1)
    if len(raw) > FACTS_BYTES:
        raise ValueError(f"{file.name} has more than {FACTS_BYTES >> 20} MiB")
    return json.loads(raw.decode())


def _check(found: Any, size: int, columns: Sequence[str] | None) -> list[str]:
    """Refuse what the file's own description shows to be too large, or of another kind; returns the
    columns of text."""
    schema = found.schema.to_arrow_schema()
    wanted = schema.names if columns is None else columns
    if absent := [name for name in wanted if name not in schema.names]:
        raise ValueError(f"its tables have no column {', '.join(absent)}")
    if len(set(schema.names)) < len(schema) or found.num_columns != len(schema):
        raise ValueError("a table has columns within columns, or two of one name")
    if other := [f.name for f in schema if not _is_known(f.type)]:
        raise ValueError(f"a table's {other[0]} holds neither numbers nor text")
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != found.num_rows or not 0 <= rows <= ROWS + ROWS_PER_BYTE * size:
        raise ValueError(f"a table claims {found.num_rows} rows in {size} bytes")
    for group in groups:
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.num_values != group.num_rows:
                raise ValueError(f"a column claims {chunk.num_values} of {group.num_rows} rows")
            if chunk.compression not in CODECS or not set(chunk.encodings) <= ENCODINGS:
                kind = f"{chunk.compression}, {', '.join(chunk.encodings)}"
                raise ValueError(f"a table is packed in a way that retrace does not use ({kind})")
    return [name for name in wanted if any(is_text(schema.field(name).type) for is_text in TEXTS)]


def _is_known(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return any(known(kind.value_type) for known in TEXTS)
    return any(known(kind) for known in KINDS)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a column's texts, each row's counted."""
    return sum(
        pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        for chunk in column.chunks
    )
