"""What a notebook shows of a trace and of results: short, and no markup of whoever wrote them."""

from pathlib import Path

from retrace.analyze import Results, analyze
from retrace.testing import make_trace
from retrace.traces import open_trace


def test_results(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.zarr", layers=[{}], sequences=2)
    results = analyze(trace, {"<b>mine</b>": "window", "exact": "exact"}, [4, 8], workers=1)
    place = str(tmp_path / "t.zarr")
    methods = ["<b>mine</b>", "exact"]
    assert repr(results) == (
        f"Results({place!r}, methods={methods}, topk=[4, 8], protocol='all:256')"
    )
    page = results._repr_html_()
    assert "&lt;b&gt;mine&lt;/b&gt;, 4" in page and "<b>" not in page
    assert page.count("<tr") == 1 + len(results.summary())


def test_results_without_a_figure(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t.zarr", layers=[{}], sequences=2)
    results = analyze(trace, ["exact"], [4], workers=1).without(["exact"])
    assert isinstance(results, Results)
    assert "methods=[], topk=[]" in repr(results)
    assert "<table" in results._repr_html_()


def test_a_trace(tmp_path: Path) -> None:
    make_trace(tmp_path / "<i>t.zarr", layers=[{}, {}], sequences=2, positions=20)
    page = open_trace(tmp_path / "<i>t.zarr")._repr_html_()
    assert "&lt;i&gt;t.zarr" in page and "<i>" not in page
    for words in ("2 of 2", ">40<", "0 to 1", "float32"):
        assert words in page
