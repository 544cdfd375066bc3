"""A trace is data that anybody may have written: it is read as it was, or refused in one line."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrace.traces import RetraceError, create_trace, open_trace, resume_trace, verify_trace

pytestmark = pytest.mark.usefixtures("bounded")

MakePlan = Callable[..., Any]
Contents = dict[str, bytes]

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 13, 15, 2**31, 2**53, 2**64, 10**30, 1e308, 0.5])
THINGS = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.sampled_from(["", "..", "../../x", "float64", "object", "vlen-bytes", "NaN", "a" * 300]),
    st.just([]),
    st.just({}),
    st.lists(NUMBERS, max_size=5),
    st.just({"name": "regular", "configuration": {"chunk_shape": [0]}}),
    st.just([{"name": "numcodecs.pickle"}]),
    st.just([{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}]),
)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a trace is spoilt, again and again."""
    return tmp_path_factory.mktemp("spoilt") / "t.zarr"


@pytest.fixture(params=[1, 2], ids=["shards of one", "shards of two"])
def contents(
    make_plan: MakePlan, rules: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> Contents:
    """The files of a whole trace of two sequences, with a shard each or one for both."""
    plan = make_plan(lengths=(5, 3), rules={0: rules()})
    rng = np.random.default_rng(0)
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = rng.standard_normal(tensor.shape)
    marks = [{"evidence": [range(1, 3)], "answer": [range(4, 5)]}, {}]
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments, marks=marks, bundle=request.param)
    plan.fill(writer, range(2))
    writer.close()
    return {
        str(file.relative_to(writer.path)): file.read_bytes()
        for file in sorted(writer.path.rglob("*"))
        if file.is_file()
    }


def lay_out(contents: Contents, path: Path) -> None:
    """Make the files of `path` these, writing only those that differ."""
    for file in [p for p in path.rglob("*") if p.is_symlink() or p.is_file()]:
        if file.is_symlink() or contents.get(str(file.relative_to(path))) != file.read_bytes():
            file.unlink()
    for name, data in contents.items():
        if not (path / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)


def everything(path: Path) -> dict[str, bytes]:
    """All that a reader can be asked for, each as bytes or as the refusal of it."""
    read: dict[str, bytes] = {}
    try:
        trace = open_trace(path)
        sequences, layers = trace.sequences, trace.layers
    except RetraceError as error:
        assert "\n" not in str(error)
        return {}
    for sequence in sequences:
        asked = {n: getattr(trace, n) for n in ("tokens", "nll", "query_positions", "phase")}
        asked["marks"] = lambda s: np.array(str(trace.marks(s)))
        for layer in layers:
            for name in ("query", "key", "value"):
                asked[f"{layer} {name}"] = lambda s, i=layer, n=name: getattr(trace.layer(i), n)(s)
        for name, ask in asked.items():
            try:
                array = ask(sequence)
            except RetraceError as error:
                assert "\n" not in str(error)
            else:
                read[f"{name} {sequence}"] = f"{array.dtype} {array.shape} ".encode() + bytes(array)
    return read


def check(contents: Contents, changed: Contents, path: Path) -> None:
    """What can be read of a changed trace is what was written, and the rest is known."""
    lay_out(contents, path)
    whole = everything(path)
    lay_out(changed, path)
    started = time.monotonic()
    read, found = everything(path), None
    assert all(whole.get(name) == data for name, data in read.items())
    try:
        found = verify_trace(path)
    except RetraceError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - started < 10
    if found is not None and found.whole and found.finished == (0, 1) and found.layers == (0,):
        assert read == whole


@given(data=st.data())
def test_chunks_that_were_changed(contents: Contents, spoilt: Path, data: st.DataObject) -> None:
    changed = dict(contents)
    chunks = [name for name in contents if not name.endswith("zarr.json")]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(chunks))
        held = bytearray(changed.get(name, b""))
        how = data.draw(st.sampled_from(["flip", "cut", "remove", "swap", "grow"]))
        if how == "flip" and held:
            held[data.draw(st.integers(0, len(held) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del held[data.draw(st.integers(0, len(held))) :]
        elif how == "grow":
            held += data.draw(st.binary(min_size=1, max_size=40))
        elif how == "swap":
            # With another array's: a chunk of one and the same form is as good as its own.
            others = [c for c in chunks if len(contents[c]) != len(contents[name])]
            held = bytearray(contents[data.draw(st.sampled_from(others))])
        changed[name] = bytes(held)
        if how == "remove":
            del changed[name]
    # A mark that is gone says that its sequence is not finished, and that is all it does.
    check(contents, changed, spoilt)


@given(data=st.data())
def test_metadata_that_was_changed(contents: Contents, spoilt: Path, data: st.DataObject) -> None:
    changed = dict(contents)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([n for n in contents if n.endswith("zarr.json")]))
        metadata = json.loads(changed[name])
        inside, keys = metadata, list(metadata)
        while keys:
            key = data.draw(st.sampled_from(keys))
            deeper = inside[key]
            if isinstance(deeper, dict | list) and deeper and data.draw(st.booleans()):
                inside = deeper
                keys = list(deeper) if isinstance(deeper, dict) else list(range(len(deeper)))
            elif isinstance(inside, dict) and data.draw(st.booleans()):
                del inside[key]
                break
            else:
                inside[key] = data.draw(THINGS)
                break
        changed[name] = json.dumps(metadata).encode()
    lay_out(changed, spoilt)
    started = time.monotonic()
    everything(spoilt)  # the figures of other rules are no other figures: only what is refused
    try:
        verify_trace(spoilt)
    except RetraceError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - started < 10


@given(data=st.data())
def test_metadata_that_is_none(contents: Contents, spoilt: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in contents if n.endswith("zarr.json")]))
    raw = contents[name]
    garbage = st.one_of(
        st.binary(max_size=60),
        st.just(b"[" * 200_000),
        st.just(b'{"a":' * 100_000),
        st.just(b"9" * 10_000),
        st.integers(0, len(raw)).map(lambda n: raw[:n]),
    )
    check(contents, {**contents, name: data.draw(garbage)}, spoilt)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers/0/key", [2, 2, 10**15, 6]),
        ("layers/0/key", [10**15, 2, 5, 6]),
        ("length", [10**15]),
        ("tokens", [2, 10**15]),
        ("query_positions", [2, 10**15]),
        ("marks", [2, 10**15, 3]),
        ("done", [10**15]),
    ],
)
def test_a_claim_of_petabytes(
    contents: Contents, spoilt: Path, name: str, shape: list[int], shared: bool
) -> None:
    metadata = json.loads(contents[f"{name}/zarr.json"])
    metadata["shape"] = shape
    chunk = shape if shared else [1, *shape[1:]]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    lay_out({**contents, f"{name}/zarr.json": json.dumps(metadata).encode()}, spoilt)
    started = time.monotonic()
    with pytest.raises(RetraceError, match="is damaged"):
        trace = open_trace(spoilt)
        assert trace.sequences
        trace.tokens(0), trace.query_positions(0), trace.marks(0), trace.layer(0).key(0)
    assert not verify_trace(spoilt).whole
    assert time.monotonic() - started < 5


def test_what_leads_out_of_the_trace(
    contents: Contents, spoilt: Path, make_plan: MakePlan, rules: Any
) -> None:
    lay_out(contents, spoilt)
    elsewhere = spoilt.parent / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(spoilt, elsewhere)
    for name in ("layers", "layers/0", "layers/0/key", "tokens", "length", "done/zarr.json"):
        lay_out(contents, spoilt)
        link = spoilt / name
        shutil.rmtree(link) if link.is_dir() else link.unlink()
        link.symlink_to(elsewhere / name)
        with pytest.raises(RetraceError, match="leads out of the trace"):
            raise verify_trace(spoilt).damages[0]
        with pytest.raises(RetraceError, match="leads out of the trace"):
            resume_trace(spoilt, **make_plan(lengths=(5, 3), rules={0: rules()}).arguments)


def test_links_that_stay_inside_are_followed(contents: Contents, tmp_path: Path) -> None:
    path = tmp_path / "linked.zarr"
    lay_out(contents, path)
    (path / "layers/0").rename(path / "moved")
    (path / "layers/0").symlink_to(path / "moved")
    link = tmp_path / "link.zarr"
    link.symlink_to(path)
    assert verify_trace(link).whole


def test_formats_that_unpickle_are_not_opened(contents: Contents, spoilt: Path) -> None:
    """Version 2 of Zarr has object arrays, and a codec for them that is pickle."""
    lay_out(contents, spoilt)
    (spoilt / "tokens/zarr.json").unlink()
    (spoilt / "tokens/.zarray").write_text(
        json.dumps(
            {
                "zarr_format": 2,
                "shape": [2, 5],
                "chunks": [1, 5],
                "dtype": "|O",
                "filters": [{"id": "pickle"}],
                "compressor": None,
                "fill_value": None,
                "order": "C",
            }
        )
    )
    with pytest.raises(RetraceError, match=r"its zarr\.json is missing"):
        open_trace(spoilt).tokens(0)


def test_an_index_that_points_anywhere(contents: Contents, spoilt: Path) -> None:
    import google_crc32c

    name = "layers/0/key/c/0/0/0/0"
    raw = contents[name]
    for place in ((0, 2**63), (2**63, 124), (len(raw), 124), (0, 1), (2**64 - 1, 2**64 - 1)):
        entries = (
            2
            * json.loads(contents["done/zarr.json"])["chunk_grid"]["configuration"]["chunk_shape"][
                0
            ]
        )
        index = np.array([place] * entries, "<u8").tobytes()
        checked = index + int(google_crc32c.value(index)).to_bytes(4, "little")
        changed = raw[: -len(checked)] + checked
        assert len(changed) == len(raw)
        lay_out({**contents, name: changed}, spoilt)
        with pytest.raises(RetraceError, match="key of layer 0, sequence 0 is damaged"):
            open_trace(spoilt).layer(0).key(0)
