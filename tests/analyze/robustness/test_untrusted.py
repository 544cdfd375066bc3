"""Tables and facts of folders that anybody may have changed: as written, or refused unallocated."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrace.analyze import Recommendation, Results, analyze, merge
from retrace.analyze.storage.journal import Journal, read_journals
from retrace.analyze.storage.untrusted import FACTS_BYTES, read_facts, read_table
from retrace.analyze.tables.columns import COLUMNS
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture
def folder(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> Path:
    """Results of a small trace."""
    trace = make_trace(rules(), [40, 30])
    analyze(trace, ["exact", "dense"], [2], out=tmp_path / "r", keep_exact=False, workers=1)
    return tmp_path / "r"


def test_tables_are_read_as_pandas_reads_them(folder: Path) -> None:
    for name in ("metrics", "curves", "sequences", "positions"):
        file = folder / f"{name}.parquet"
        pd.testing.assert_frame_equal(read_table(file), pd.read_parquet(file))
    some = read_table(folder / "metrics.parquet", ["method", "mean"])
    assert list(some) == ["method", "mean"]


def test_a_table_of_which_all_rows_repeat_is_no_bomb(tmp_path: Path) -> None:
    """Dense attention errs nowhere: of its figures one per query set differs."""
    rows = 200_000
    frame = pd.DataFrame({name: np.zeros(rows) for name in COLUMNS} | {"method": "dense"})
    fractions = np.arange(rows) % 7 == 3
    frame.loc[fractions, "mean"] = np.random.default_rng(0).random(fractions.sum())
    frame.to_parquet(tmp_path / "t.parquet")
    assert len(read_table(tmp_path / "t.parquet", COLUMNS)) == rows


def many_rows(file: Path) -> None:
    """A quarter of a billion, of one number."""
    group = pa.table({"mean": pa.array(np.zeros(1 << 22))})
    with pq.ParquetWriter(file, group.schema) as writer:
        for _ in range(60):
            writer.write_table(group)


def long_texts(file: Path) -> None:
    """Fifty thousand times the same four million letters."""
    text = pa.array(["x" * (1 << 22)])
    column = pa.DictionaryArray.from_arrays(np.zeros(50_000, np.int32), text)
    pq.write_table(pa.table({"method": column}), file, store_schema=False)


def packed(file: Path) -> None:
    """Zeros that zstd packs into next to nothing."""
    plain = pa.table({"mean": pa.array(np.zeros(1 << 24))})
    pq.write_table(plain, file, compression="zstd", use_dictionary=False)


def repeated_prefixes(file: Path) -> None:
    """Texts of which each is the one before, in an encoding that says just that."""
    table = pa.table({"method": ["x" * 1000] * 60_000})
    encoding = {"method": "DELTA_BYTE_ARRAY"}
    pq.write_table(table, file, use_dictionary=False, column_encoding=encoding)


def lists(file: Path) -> None:
    """A row that is a list of a million."""
    pq.write_table(pa.table({"mean": [[0.0] * (1 << 20)]}), file)


def dates(file: Path) -> None:
    """What is neither a number nor text."""
    pq.write_table(pa.table({"method": pa.array([0], pa.timestamp("s"))}), file)


HOSTILE = {
    many_rows: "claims 251658240 rows",
    long_texts: "texts of t.parquet are larger",
    packed: "claims 16777216 rows",
    repeated_prefixes: "packed in a way",
    lists: "columns within columns|neither numbers nor text",
    dates: "neither numbers nor text",
}
LIMITED = """
import resource, sys
from pathlib import Path
from retrace.analyze.storage.untrusted import read_table
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
limit = status("VmSize") + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = status("VmHWM")
for file in sys.argv[1:]:
    try:
        read_table(Path(file))
    except ValueError as error:
        print(error)
print(status("VmHWM") - before)
"""
"""Addresses are bounded loosely, since each thread of Arrow's reserves many that it never uses;
what is judged is the most memory that was in use."""


def test_what_claims_more_than_it_holds_is_refused_in_little_memory(tmp_path: Path) -> None:
    files = []
    for write in HOSTILE:
        files.append(tmp_path / write.__name__ / "t.parquet")
        files[-1].parent.mkdir()
        write(files[-1])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, files)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *lines, held = done.stdout.splitlines()
    assert int(held) < 192 << 20
    assert len(lines) == len(HOSTILE), done.stdout
    for line, told in zip(lines, HOSTILE.values(), strict=True):
        assert any(words in line for words in told.split("|")), line


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_tables_of_folders_without_digests(folder: Path, data: st.DataObject) -> None:
    """Read as far as they can be, or refused in one line. Of a table the footer is left whole: on
    some that are damaged, and have a length that fits, Arrow ends the process by itself."""
    run = json.loads((folder / "run.json").read_text())
    run.pop("tables", None)
    (folder / "run.json").write_text(json.dumps(run))
    file = folder / "metrics.parquet"
    before = file.read_bytes()
    held = bytearray(before)
    footer = int.from_bytes(before[-8:-4], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        held[data.draw(st.integers(0, len(held) - footer - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(held)
    try:
        assert len(Results.load(folder).metrics) < 1 << 17
    except RetraceError as error:
        assert "\n" not in str(error)
    file.write_bytes(before)


def test_digests_do_not_vouch_for_size(folder: Path) -> None:
    rows = pq.read_table(folder / "metrics.parquet").slice(0, 1).take(np.zeros(300_000, int))
    with pq.ParquetWriter(folder / "metrics.parquet", rows.schema) as writer:
        for _ in range(20):
            writer.write_table(rows)
    run = json.loads((folder / "run.json").read_text())
    raw = (folder / "metrics.parquet").read_bytes()
    run["tables"]["metrics.parquet"] = hashlib.sha256(raw).hexdigest()
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(RetraceError, match="claims 6000000 rows"):
        Results.load(folder)


def test_facts_that_are_too_large(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.touch()
    with large.open("r+b") as file:
        file.truncate(FACTS_BYTES + 1)
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_facts(large)
    with pytest.raises(RetraceError, match="more than 64 MiB"):
        Recommendation.load(large)
    large.replace(folder / "run.json")
    with pytest.raises(RetraceError, match="more than 64 MiB"):
        Results.load(folder)


@pytest.mark.parametrize("raw", ["", "[]", "{}", "[" * 100_000, '{"trace": 3}'])
def test_parts_whose_run_is_not_as_written(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, raw: str
) -> None:
    trace, out = make_trace(rules(), [40, 30]), tmp_path / "p"
    analyze(trace, ["exact"], [2], out=out, part=(1, 2), keep_exact=False, workers=1)
    (job,) = out.glob(".parts/*/job.json")
    job.write_text(raw)
    with pytest.raises(RetraceError, match="is not as retrace wrote it"):
        merge([out])
    # The next part of that run says again what run it is.
    analyze(trace, ["exact"], [2], out=out, part=(2, 2), keep_exact=False, workers=1)
    merge([out])


def test_a_part_of_too_many_buckets_is_computed_anew(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, out = make_trace(rules(), [40, 30]), tmp_path / "p"
    settings: dict[str, Any] = {"out": out, "keep_exact": False, "workers": 1}
    analyze(trace, ["exact"], [2], part=(1, 2), **settings)
    (parts,) = out.glob(".parts/*")
    ((at, arrays),) = read_journals(parts)
    name = "0.by_bucket.position"
    arrays[name] = np.ones((3, 33, *arrays[name].shape[2:]))
    (file,) = parts.glob("*.journal")
    file.unlink()
    Journal(parts).append(at, arrays)
    found = analyze(trace, ["exact"], [2], **settings)
    whole = analyze(trace, ["exact"], [2], keep_exact=False, workers=1)
    pd.testing.assert_frame_equal(found.positions, whole.positions)
