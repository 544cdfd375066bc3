"""Plots of results of every size: one layer or eighty, budgets for which no query counts."""

import itertools
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from retrace.analyze import Results
from retrace.analyze.metrics.patterns import KINDS, PATTERNS
from retrace.analyze.metrics.registry import BUCKETED, SWEPT, TAILED
from retrace.analyze.outputs.plots.costs import error_by_cost
from retrace.analyze.outputs.plots.patterns import COLOURS as PATTERN_COLOURS
from retrace.analyze.outputs.plots.patterns import pattern_map
from retrace.analyze.outputs.plots.positions import position_figures
from retrace.analyze.outputs.plots.results import PLOTS, draw_all, pictures, slug
from retrace.analyze.outputs.plots.style import COLOURS, DIVERGING, SEQUENTIAL, styles_of
from retrace.analyze.outputs.plots.sweeps import sweep_figures
from retrace.analyze.outputs.plots.tails import tails_by_layer
from retrace.analyze.tables.columns import PATTERN_COLUMNS, POSITION_COLUMNS, TAIL_COLUMNS
from retrace.traces import RetraceError

PNG = b"\x89PNG"


def some_results(
    layers: int, heads: int, methods: list[str], topk: list[int], empty: tuple[int, ...] = ()
) -> Results:
    """Random figures; none where no query counts, at the budgets in `empty`."""
    generator = np.random.default_rng(0)
    metrics = ["recall", "error_norm", "attention_fraction", "exact_attention_fraction"]
    metrics.append("bytes_ratio")
    rows = []
    for method, layer, head, k, metric in itertools.product(
        methods, range(layers), range(heads), topk, metrics
    ):
        mean, std = (np.nan, np.nan) if k in empty else generator.random(2)
        rows.append((method, layer, f"layers.{layer}", head, k, metric, mean, std, 9, "all", "10k"))
    names = ["method", "layer", "module", "head", "topk", "metric", "mean", "std", "count"]
    frame = pd.DataFrame(rows, columns=[*names, "protocol", "min_context"])
    curves = frame[frame["metric"].isin(metrics[2:4])]
    return Results(frame, curves, {"min_context": None, "protocol": "all:256"})


@pytest.mark.parametrize(
    ("layers", "heads", "methods", "topk", "empty"),
    [
        (1, 1, ["exact"], [1], ()),
        (3, 2, ["exact", "quest:page=8"], [5, 10, 20, 50], ()),
        (3, 2, ["window"], [5, 10], (10,)),
        (2, 2, ["exact", "random"], [10], (10,)),
        (80, 2, [f"a-method:of={i},with=a,very=long,list=of,parameters=all" for i in range(6)],
         [10], ()),
    ],
    ids=["smallest", "budgets", "some-nan", "all-nan", "large"],
)  # fmt: skip
def test_every_figure_is_drawn(
    tmp_path: Path,
    layers: int,
    heads: int,
    methods: list[str],
    topk: list[int],
    empty: tuple[int, ...],
) -> None:
    files = draw_all(some_results(layers, heads, methods, topk, empty), tmp_path / "plots")
    # All budgets of a method up to three, else the largest.
    heatmaps = len(methods) * (len(topk) if len(topk) <= 3 else 1)
    assert len(files) == len(set(files)) == heatmaps + 5
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_a_prefill_is_drawn_over_pairs(tmp_path: Path) -> None:
    results = some_results(2, 2, ["subblock", "xattention"], [5, 10, 20])
    assert results.cost == "bytes_ratio"
    rows = results.metrics
    pairs = rows[rows["metric"] == "bytes_ratio"].assign(metric="compute_ratio", mean=0.5)
    pairs["mean"] *= pairs["topk"] / 20
    run = {"protocol": "prefill:4", "min_context": 0}
    prefill = Results(pd.concat([rows, pairs], ignore_index=True), results.curves, run)
    assert prefill.cost == "compute_ratio"
    means = prefill.metrics.pivot_table("mean", ["method", "topk"], "metric")
    panels = error_by_cost(prefill).axes
    for axes, figures in zip(
        panels, (means["error_norm"], 1 - means["attention_fraction"]), strict=True
    ):
        lines = {str(line.get_label()): line for line in axes.lines}
        for method in prefill.methods():
            np.testing.assert_allclose(np.asarray(lines[method].get_xdata()), [0.125, 0.25, 0.5])
            np.testing.assert_allclose(np.asarray(lines[method].get_ydata()), figures[method])
    names = {file.name for file in draw_all(prefill, tmp_path)}
    assert "error-by-pairs.png" in names and "error-by-bytes.png" not in names
    assert all(any(fnmatch(name, f"{pattern}.png") for pattern in PLOTS) for name in names)


def test_tails_by_layer(tmp_path: Path) -> None:
    results = some_results(2, 2, ["exact", "quest"], [5, 10])
    places = itertools.product(["exact", "quest"], [0, 1], [0, 1], [5, 10], TAILED)
    generator = np.random.default_rng(0)
    rows = pd.DataFrame([*places], columns=["method", "layer", "head", "topk", "metric"])
    rows[["p5", "p50", "p95", "worst"]] = generator.random((len(rows), 4))
    others = {"module": "m", "worst_sequence": 0, "worst_position": 3, "count": 9}
    results.tails = rows.assign(**others)[list(TAIL_COLUMNS)].astype(TAIL_COLUMNS)
    tails = rows[rows["topk"] == 10].set_index(["metric", "method"])
    for metric, axes in zip(TAILED, tails_by_layer(results).axes, strict=True):
        bad, worst = ("p95", "max") if metric == "error_norm" else ("p5", "min")
        for i, method in enumerate(["exact", "quest"]):
            median, points = axes.lines[2 * i : 2 * i + 2]
            by_layer = tails.loc[(metric, method)].groupby("layer")
            np.testing.assert_allclose(np.asarray(median.get_ydata()), by_layer["p50"].mean())
            np.testing.assert_allclose(np.asarray(points.get_ydata()), by_layer["worst"].agg(worst))
            (bars,) = [c for c in axes.collections if isinstance(c, LineCollection)][i : i + 1]
            ends = [segment[1][1] for segment in bars.get_segments()]
            np.testing.assert_allclose(ends, by_layer[bad].mean())
    assert "tails-by-layer.png" in {file.name for file in draw_all(results, tmp_path)}


def test_the_map_of_patterns(tmp_path: Path) -> None:
    layers, heads = [1, 4], range(3)
    rows = [
        (layer, head, 2, "m", pattern, 0.5, 0.1, pattern == KINDS[(layer + head) % 4])
        for layer, head, pattern in itertools.product(layers, heads, PATTERNS)
        if (layer, head) != (4, 2)  # that is missing
    ]
    columns = ["layer", "head", "count", "module", "pattern", "mean", "std", "best"]
    results = some_results(2, 2, ["subblock"], [5])
    results.run["protocol"] = "prefill:4"
    assert not {"head-patterns.png"} & {file.name for file in draw_all(results, tmp_path)}
    results.head_patterns = pd.DataFrame(rows, columns=columns).astype(PATTERN_COLUMNS)
    [image] = pattern_map(results).axes[0].images
    cells = np.ma.masked_invalid(np.asarray(image.get_array(), float))
    assert cells.tolist() == [[1, 2, 3], [0, 1, None]]
    assert {"head-patterns.png"} <= {file.name for file in draw_all(results, tmp_path)}


def swept_results(parameters: dict[str, dict[str, object]]) -> Results:
    results = some_results(2, 2, list(parameters), [5, 10])
    facts = {m: {"name": m.split(":")[0], "parameters": p} for m, p in parameters.items()}
    return Results(results.metrics, results.curves, {**results.run, "methods": facts})


def test_figures_over_a_parameter() -> None:
    grid: dict[str, dict[str, object]] = {
        f"quest:page={page},pool={pool}": {"page": page, "pool": pool, "keep": "none"}
        for page in (32, 8, 16)
        for pool in ("none", "sum")
    }
    results = swept_results({**grid, "window": {"keep": "none"}})
    assert results.names() == ["quest", "window"]
    table = results.parameters("quest")
    assert list(table.loc["quest:page=8,pool=sum"]) == [8, "sum", "none"]
    figures = sweep_figures(results)
    assert list(figures) == [("quest", "page"), ("quest", "pool")]
    panels = figures["quest", "page"](None).axes
    assert len(panels) == 2 * len(SWEPT)  # a row for each way to pool
    line = panels[SWEPT.index("error_norm")].get_lines()[0]
    rows = results.metrics
    rows = rows[(rows["metric"] == "error_norm") & (rows["topk"] == 5)]
    means = rows.groupby("method")["mean"].mean()
    assert np.asarray(line.get_xdata()).tolist() == [8, 16, 32]
    assert np.asarray(line.get_ydata()).tolist() == [
        means[f"quest:page={p},pool=none"] for p in (8, 16, 32)
    ]
    assert line.get_label() == "k = 5"
    assert panels[0].get_xscale() == "log"
    assert figures["quest", "pool"](None).axes[0].get_xscale() == "linear"


def test_bars_over_sequences() -> None:
    grid: dict[str, dict[str, object]] = {f"quest:page={p}": {"page": p} for p in (8, 16)}
    results = swept_results(grid)
    rows = results.metrics.drop(columns=["std", "protocol", "min_context"])
    each = pd.concat([rows.assign(sequence=s, mean=rows["mean"] + s / 10) for s in range(4)])
    results = Results(results.metrics, results.curves, results.run, each)
    axes = sweep_figures(results)["quest", "page"](None).axes[SWEPT.index("error_norm")]
    drawn = [path.vertices[0, 1] for bars in axes.collections for path in bars.get_paths()]
    known = results.intervals("model", metrics=["error_norm"])
    assert len(drawn) == 4  # a bar for each page and budget
    assert sorted(drawn) == pytest.approx(sorted(known["low"]))


def test_no_figure_where_all_else_differs() -> None:
    assert not sweep_figures(
        swept_results({"a:b=1,c=1": {"b": 1, "c": 1}, "a:b=2,c=2": {"b": 2, "c": 2}})
    )


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_all(some_results(2, 2, ["exact"], [3]), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_names_of_files() -> None:
    assert slug("quest") == "quest"
    assert slug("mine.py:Mine:a=1,b=sink:4+recent:64") == "mine.py-Mine-a=1-b=sink-4+recent-64"
    long = [slug(f"m:a={'x' * 300},b={i}") for i in range(2)]
    assert long[0] != long[1] and max(map(len, long)) < 140


def test_figures_over_positions(tmp_path: Path) -> None:
    """A line for each method, through the means of the buckets that there are."""
    results = some_results(3, 2, ["exact", "quest"], [5, 10, 20, 50])
    rows = results.metrics[results.metrics["metric"].isin(BUCKETED)]
    generator = np.random.default_rng(1)
    results.positions = pd.concat(
        rows.assign(axis=axis, first=first, mean=rows["topk"] / 50 * generator.random(), count=9)
        for axis, firsts in (("position", [50, 64, 128]), ("distance", [0, 1, 2, 4]))
        for first in firsts
    ).astype(POSITION_COLUMNS)
    figures = position_figures(results)
    assert list(figures) == ["position", "distance"]
    panels = figures["distance"](None).axes
    assert len(panels) == 9  # three metrics, three of the budgets
    means = results.positions.groupby(["axis", "metric", "topk", "method", "first"], observed=True)
    of = means["mean"].mean()
    for axes, (metric, k) in zip(panels, itertools.product(BUCKETED, [5, 20, 50]), strict=True):
        for line, method in zip(axes.lines, ["exact", "quest"], strict=True):
            np.testing.assert_allclose(line.get_ydata(), of["distance", metric, k, method])
            assert list(line.get_xdata()) == [0.5, 1, 2.5, 5.5]
            assert max(line.get_ydata()) <= axes.get_ylim()[1]
    names = {file.name for file in draw_all(results, tmp_path / "plots")}
    assert {"by-position.png", "by-distance.png"} <= names


@pytest.fixture
def swept() -> Results:
    """Results of which most kinds of plots are drawn."""
    return swept_results({f"quest:page={p}": {"page": p} for p in (8, 16)})


def test_formats_for_papers(swept: Results, tmp_path: Path) -> None:
    """Each plot in each format, of letters that can be searched, and the same bytes again."""
    names = {file.stem for file in swept.draw(tmp_path / "png")}
    files = swept.draw(tmp_path / "all", ["png", "svg", "pdf", "pdf"])
    assert {file.name for file in files} == {
        f"{n}.{form}" for n in names for form in ("png", "svg", "pdf")
    }
    for file in files:
        begins = {".png": PNG, ".svg": b"<?xml", ".pdf": b"%PDF-"}[file.suffix]
        assert file.read_bytes().startswith(begins)
        if file.suffix == ".pdf":
            held = file.read_bytes()  # letters of TrueType, not drawings of them
            assert b"/FontFile2" in held and b"/Subtype /Type3" not in held
    before = {file.name: file.read_bytes() for file in files}
    again = swept.draw(tmp_path / "again", ["svg", "pdf"])
    assert all(file.read_bytes() == before[file.name] for file in again)


def test_no_picture_of_earlier_figures_stays(swept: Results, tmp_path: Path) -> None:
    swept.draw(tmp_path, ["svg", "pdf"])
    (tmp_path / "mine.svg").write_text("of somebody else")
    files = swept.draw(tmp_path, ["pdf"])
    assert {*tmp_path.iterdir()} == {*files, tmp_path / "mine.svg"}
    with pytest.raises(RetraceError, match="'eps': choose png, svg, pdf"):
        swept.draw(tmp_path, ["eps"])


def test_every_plot_is_drawn_onto_given_axes(swept: Results) -> None:
    """The same lines in the same panels; the caller's figure keeps its own title and legend."""
    for name, draw in pictures(swept).items():
        whole = draw(None)
        panels = [axes for axes in whole.axes if axes.get_label() != "<colorbar>"]
        panels = [axes for axes in panels if axes.axison]
        assert whole.get_suptitle()
        own = Figure()
        given = own.subplots(1, len(panels) + 1, squeeze=False)
        assert swept.plot(name, given[0, :-1]) is own
        assert not own.get_suptitle() and not own.legends
        assert not given[0, -1].has_data()
        for axes, expected in zip(given[0], panels, strict=False):
            assert len(axes.lines) == len(expected.lines)
            for line, other in zip(axes.lines, expected.lines, strict=True):
                np.testing.assert_array_equal(line.get_xydata(), other.get_xydata())
            assert axes.get_ylim()[0] == expected.get_ylim()[0]
            assert axes.get_xlabel() or name.startswith("sweep")
        with pytest.raises(RetraceError, match=f"has {len(panels)} panels"):
            swept.plot(name, given)
    assert isinstance(swept.plot("attention-fraction-curves", Figure().subplots()), Figure)
    with pytest.raises(RetraceError, match=r"no plot 'error-by-byte'\. Did you mean"):
        swept.plot("error-by-byte")


def lightness(colour: str) -> float:
    """CIE L* of an sRGB colour, 0 to 100."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return float(116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance)


def test_methods_are_told_apart_in_grey() -> None:
    methods = [str(i) for i in range(140)]
    styles = styles_of(methods)
    assert len(set(styles.values())) == len(methods) + 1
    # Dash and marker alone, without any colour, as long as there are pairs of them.
    plain = [(styles[m].dashes, styles[m].marker) for m in methods[:24]]
    assert len(set(plain)) == 24
    for these in (COLOURS[:3], [*PATTERN_COLOURS.values()]):
        tones = sorted(lightness(colour) for colour in these)
        assert min(np.diff(tones)) > 9
    for name in (SEQUENTIAL, DIVERGING):
        tones = [lightness(to_hex(colormaps[name](x))) for x in np.linspace(0, 1, 20)]
        assert min(np.diff(tones)) > 0


def test_what_bytes_buy_has_bars_over_sequences() -> None:
    results = swept_results({"quest": {}, "window": {}})
    rows = results.metrics.drop(columns=["std", "protocol", "min_context"])
    each = pd.concat([rows.assign(sequence=s, mean=rows["mean"] + s / 50) for s in range(4)])
    results = Results(results.metrics, results.curves, results.run, each)
    figure = error_by_cost(results)
    assert "bars: 95 % over sequences" in figure.get_suptitle()
    known = results.intervals("model").set_index("metric")
    for axes, metric in zip(figure.axes, ("error_norm", "attention_fraction"), strict=True):
        drawn = [path.vertices[:, 1] for bars in axes.collections for path in bars.get_paths()]
        ends = known.loc[metric, ["low", "high"]].to_numpy(float)
        expected = ends if metric == "error_norm" else 1 - ends[:, ::-1]
        np.testing.assert_allclose(sorted(map(sorted, drawn)), sorted(expected.tolist()))
