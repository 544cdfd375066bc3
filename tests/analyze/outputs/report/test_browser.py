"""A page as a person uses it, in the Chromium of this machine, without a network."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results
from retrace.analyze.metrics.registry import METRICS, WITH_INTERVAL
from retrace.analyze.outputs.report.page import page
from retrace.analyze.tables.columns import TAIL_COLUMNS

pytest.importorskip("plotly", reason="needs the report extra")
pytest.importorskip("playwright", reason="needs the dev extra")

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

Make = Callable[..., Results]
Open = Callable[..., Page]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LAYERS, HEADS, TOPK = [0, 1, 3, 4], 5, [5, 10, 50]
FIRSTS = [0, 1, 4, 8, 512]
PREFILL = {"protocol": "prefill:64", "min_context": 0}
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def results(made: Make) -> Results:
    methods = ["exact", "quest", "loki:basis=own"]
    more: dict[str, Any] = {"sequences": True, "positions": FIRSTS}
    return made(LAYERS, HEADS, methods, TOPK, range(1, 51), empty=[50], **more)


class Tabs:
    """One tab for each way to look at pages. What it shows next it draws in a quarter of the time
    that a new one takes, since it has compiled the plotting library already."""

    def __init__(self, browser: Browser) -> None:
        self.faults: list[str] = []
        self._browser = browser
        self._shown = ""
        self._tabs: dict[str, Page] = {}

    def show(
        self, file: Path, viewport: dict[str, int], color_scheme: Any = "light", **settings: Any
    ) -> Page:
        """A file, loaded anew, in a window as a new one is."""
        size: Any = viewport
        tab = self._tabs.get(str(settings))
        if tab is None:
            tab = self._tabs[str(settings)] = self._open(viewport=size, **settings)
        tab.goto("about:blank")
        tab.set_viewport_size(size)
        tab.emulate_media(media="null", color_scheme=color_scheme)
        tab.mouse.move(0, 0)
        self._shown = file.as_uri()
        tab.goto(self._shown)
        tab.wait_for_selector("body[data-ready]", state="attached")
        return tab

    def _open(self, **settings: Any) -> Page:
        context = self._browser.new_context(reduced_motion="reduce", **settings)
        context.set_offline(True)
        tab = context.new_page()
        tab.on("console", self._said)
        tab.on("pageerror", lambda error: self.faults.append(str(error)))
        tab.on("request", self._asked)
        return tab

    def _said(self, message: ConsoleMessage) -> None:
        self.faults.append(f"{message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(("data:", "about:blank", self._shown)):
            self.faults.append(request.url)


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Tabs:
    return Tabs(browser)


@pytest.fixture(scope="module")
def page_of_results(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the results that most tests look at."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page({"r": results}), encoding="utf-8")
    return file


@pytest.fixture
def open_page(tabs: Tabs, tmp_path: Path) -> Iterator[Open]:
    """Opens a page, or that of some results. At the test's end nothing may have been said on the
    console, thrown, or asked of a network."""
    tabs.faults.clear()

    def open_page(
        shown: Path | dict[str, Results], viewport: dict[str, int] = DESKTOP, **settings: Any
    ) -> Page:
        if isinstance(shown, Path):
            return tabs.show(shown, viewport, **settings)
        file = tmp_path / "report.html"
        file.write_text(page(shown), encoding="utf-8")
        return tabs.show(file, viewport, **settings)

    yield open_page
    assert not tabs.faults


def number(text: str) -> float:
    """A figure as the page shows it, without what stands beside it."""
    bare = text.replace("\u2212", "-").split(" ± ")[0].split(" [")[0]
    return float("nan") if bare == "\u2013" else float(bare)


def ends_of(text: str) -> list[float]:
    """An interval as the page shows it."""
    return [number(end) for end in text[text.index("[") + 1 : -1].split(", ")]


def rows_of(shown: Page, table: str) -> list[list[str]]:
    """The cells of a table's body."""
    cells: list[list[str]] = shown.eval_on_selector_all(
        f"#{table} tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    return cells


def column_of(shown: Page, table: str, title: str) -> int:
    """Where a table has a column."""
    titles = shown.eval_on_selector_all(
        f"#{table} thead th", "heads => heads.map(h => h.textContent.trim())"
    )
    return int(titles.index(title))


def lines_of(shown: Page, plot: str) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of a plot that have a name: x and y."""
    lines = shown.eval_on_selector(
        f"#{plot}", "p => p.data.filter(t => t.name).map(t => [t.name, [...t.x], [...t.y]])"
    )
    return {name: (x, y) for name, x, y in lines}


def of(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Some rows."""
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return rows


def cell_of(shown: Page, part: str, layer: int, head: int) -> tuple[float, float]:
    """Where a heat map has a cell, in pixels of the window."""
    area = shown.locator(f"#map-{part} .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    return (
        box["x"] + box["width"] * (head + 0.5) / HEADS,
        box["y"] + box["height"] * (LAYERS.index(layer) + 0.5) / len(LAYERS),
    )


def test_tables_hold_the_figures_of_the_results(
    open_page: Open, results: Results, page_of_results: Path
) -> None:
    shown = open_page(page_of_results)
    shown.select_option("#topk", "5")
    rows = of(results.metrics, topk=5)
    means = rows.groupby(["method", "metric"], observed=True)["mean"].mean()
    for method, *cells in rows_of(shown, "methods-table"):
        for metric, text in zip(METRICS, cells, strict=False):
            assert number(text) == pytest.approx(means[method, metric], abs=1e-4)
    shown.select_option("#method", label="loki:basis=own")
    table = results.table("loki:basis=own", 5)
    layers = rows_of(shown, "layers-table")
    assert [row[1] for row in layers] == table["Layer"].tolist()
    for title in ("Recall", "Error Norm"):
        column = column_of(shown, "layers-table", title.capitalize())
        for row, mean, std in zip(
            layers, table[f"Mean {title}"], table[f"Std {title}"], strict=True
        ):
            assert number(row[column]) == pytest.approx(mean, abs=1e-4)
            assert number(row[column].split(" ± ")[1]) == pytest.approx(std, abs=1e-4)


def test_another_method_and_metric_change_the_heat_map(
    open_page: Open, results: Results, page_of_results: Path
) -> None:
    shown = open_page(page_of_results)
    shown.select_option("#method", label="loki:basis=own")
    shown.select_option("#other", label="quest")
    shown.select_option("#metric", label="Error norm")
    shown.select_option("#topk", "10")
    grids = {
        part: np.array(shown.eval_on_selector(f"#map-{part}", "p => p.data[0].z.map(r => [...r])"))
        for part in ("method", "other", "difference")
    }
    rows = of(results.metrics, metric="error_norm", topk=10)
    wanted = {
        part: of(rows, method=method).pivot(index="layer", columns="head", values="mean").to_numpy()
        for part, method in (("method", "loki:basis=own"), ("other", "quest"))
    }
    np.testing.assert_allclose(grids["method"], wanted["method"], rtol=2e-5)
    np.testing.assert_allclose(grids["other"], wanted["other"], rtol=2e-5)
    np.testing.assert_allclose(grids["difference"], wanted["method"] - wanted["other"], atol=4e-5)
    # The comparison says the same in words.
    [row] = [row for row in rows_of(shown, "comparison-table") if row[0] == "Error norm"]
    difference = wanted["method"] - wanted["other"]
    assert number(row[3]) == pytest.approx(difference.mean(), abs=1e-4)
    assert row[6] == f"{(difference < 0).sum()} of {difference.size}"


def test_intervals_over_sequences(open_page: Open, results: Results, page_of_results: Path) -> None:
    shown = open_page(page_of_results)
    shown.select_option("#topk", "10")
    metrics = {
        column_of(shown, "methods-table", "Error norm"): "error_norm",
        column_of(shown, "methods-table", "Attention fraction"): "attention_fraction",
    }
    for row in rows_of(shown, "methods-table"):
        for column, metric in metrics.items():
            [wanted] = results.intervals("model", methods=row[:1], topk=[10], metrics=[metric])[
                ["low", "high"]
            ].to_numpy()
            np.testing.assert_allclose(ends_of(row[column]), wanted, atol=1e-4)
    # Either way round, a difference is that of the pairs of sequences.
    for method, other in (("loki:basis=own", "quest"), ("quest", "loki:basis=own")):
        shown.select_option("#method", label=method)
        shown.select_option("#other", label=other)
        less = results.difference(method, other).set_index(["topk", "metric"])
        for row in rows_of(shown, "comparison-table"):
            metric = row[0].lower().replace(" ", "_")
            if metric in WITH_INTERVAL:
                wanted = less.loc[(10, metric), ["low", "high"]]
                np.testing.assert_allclose(ends_of(row[4]), wanted.astype(float), atol=1e-4)
            else:
                assert row[4] == "\u2013"


def bands_of(shown: Page, plot: str) -> list[tuple[list[float], list[float]]]:
    """The bands of intervals in a plot: x and y around each."""
    bands: list[tuple[list[float], list[float]]] = shown.eval_on_selector(
        f"#{plot}",
        "p => p.data.filter(t => t.meta === 'interval').map(t => [[...t.x], [...t.y]])",
    )
    return bands


def test_bands_of_intervals(open_page: Open, results: Results, page_of_results: Path) -> None:
    """Of the two chosen methods, in the scope of the curves: low ends forth, high ends back."""
    shown = open_page(page_of_results)
    shown.select_option("#topk", "10")
    for layer, head, over in (("", "", "model"), ("3", "", "layer"), ("3", "2", "head")):
        shown.select_option("#layer", layer)
        shown.select_option("#head", head)
        known = results.intervals(over, metrics=["recall"])
        if layer:
            known = of(known, layer=3)
        if head:
            known = of(known, head=2)
        bands = bands_of(shown, "curve-recall")
        assert len(bands) == 2
        for (x, y), method in zip(bands, ("exact", "quest"), strict=True):
            wanted = of(known, method=method).set_index("topk")
            assert x == [5, 10, 10, 5]
            ends = [*wanted.loc[[5, 10], "low"], *wanted.loc[[10, 5], "high"]]
            np.testing.assert_allclose(y, ends, rtol=1e-4)
        caption = shown.text_content("#curves-caption") or ""
        assert "95 % intervals" in caption and "over 3 sequences" in caption
    low, high = known.set_index(["method", "topk"]).loc[("quest", 10), ["low", "high"]]
    shown.select_option("#metric", label="Recall")
    said = re.search(r"quest \S+ (\[.*?\])", shown.text_content("#readout") or "")
    assert said is not None
    # A page keeps 15 bits of a mantissa: of ends beyond 3.2 the fourth decimal may differ by one.
    np.testing.assert_allclose(ends_of(said[1]), [low, high], rtol=2**-16, atol=5.1e-5)
    # A layer's mean, in the plot of layers and in its table.
    known = results.intervals("layer", methods=["quest"], topk=[10], metrics=["recall"])
    [_, (x, y)] = bands_of(shown, "layers-plot")
    assert x == [*LAYERS, *reversed(LAYERS)]
    np.testing.assert_allclose(y, [*known["low"], *reversed(known["high"])], rtol=1e-4)
    for row, wanted in zip(rows_of(shown, "layers-table"), known.itertuples(), strict=True):
        np.testing.assert_allclose(ends_of(row[2]), [wanted.low, wanted.high], atol=1e-4)
    # A head over all layers has none, nor has a curve over positions.
    shown.select_option("#layer", "")
    assert bands_of(shown, "curve-recall") == []
    shown.select_option("#head", "")
    shown.select_option("#against", "position")
    assert bands_of(shown, "curve-recall") == []


def test_without_sequences_there_is_no_interval(open_page: Open, made: Make) -> None:
    shown = open_page({"r": made([0], 2, ["exact", "quest"], [5, 10], [5])})
    for plot in ("curve-recall", "layers-plot"):
        assert bands_of(shown, plot) == []
    assert "95 %" not in (shown.text_content("#curves-caption") or "")
    assert "[" not in (shown.text_content("#layers-table") or "")


LONG = "a-method:" + ",".join(f"parameter_{i}=value_{i}" for i in range(12))


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_long_specs_are_short_in_the_legend(
    open_page: Open, made: Make, viewport: dict[str, int]
) -> None:
    shown = open_page({"r": made([0], 2, ["exact", "quest", LONG], [5], [5])}, viewport)
    entry = shown.locator("#legend-entries span").last
    assert entry.text_content() == LONG == entry.get_attribute("title")
    box, short = entry.bounding_box(), shown.locator("#legend-entries span").nth(1).bounding_box()
    assert box and short and short["height"] < box["height"] < 2.5 * short["height"]
    assert box["x"] + box["width"] <= viewport["width"]
    shown.select_option("#method", label=LONG)
    assert shown.get_attribute("#method", "title") == LONG


def test_a_cell_tells_its_figure(open_page: Open, results: Results, page_of_results: Path) -> None:
    shown = open_page(page_of_results)
    for metric, title in (
        ("attention_fraction", "Attention fraction"),
        ("error_norm", "Error norm"),
    ):
        shown.select_option("#metric", label=title)
        shown.select_option("#topk", "10")
        shown.mouse.move(*cell_of(shown, "method", 3, 2))
        rows = of(results.metrics, metric=metric, topk=10, layer=3, head=2)
        [figure] = of(rows, method="quest")["mean"]
        label = shown.locator("#map-method .hovertext", has_text=f"{title.lower()} ")
        label.wait_for()
        text = label.text_content() or ""
        assert "layer 3, head 2" in text
        # A page keeps 15 bits of a mantissa: the fourth decimal may differ by one.
        said = re.search(rf"{title.lower()} (\S+)", text)
        assert said is not None
        assert number(said[1].split("[")[0]) == pytest.approx(figure, abs=1e-4)
        shown.mouse.move(0, 0)


def test_a_cell_leads_to_the_curves_of_its_head(
    open_page: Open, results: Results, page_of_results: Path
) -> None:
    shown = open_page(page_of_results)
    shown.select_option("#topk", "10")
    shown.mouse.click(*cell_of(shown, "method", 3, 2))
    assert shown.text_content("#curves-title") == "Curves: layer 3, head 2"
    assert shown.locator("#curves-title").evaluate("e => e === document.activeElement")
    assert 0 <= shown.locator("#curves-title").evaluate("e => e.getBoundingClientRect().top") < 300
    head = dict(layer=3, head=2)
    for method, (x, y) in lines_of(shown, "curve-recall").items():
        curve = of(results.curves, method=method, metric="recall", **head).set_index("topk")["mean"]
        asked = of(results.metrics, method=method, metric="recall", **head).set_index("topk")
        curve.update(asked["mean"])
        assert len(x) >= 20 and 50 not in x  # of which no query counts
        np.testing.assert_allclose(y, curve[x], rtol=3e-4)
    [mean] = of(results.metrics, method="quest", metric="attention_fraction", topk=10, **head)[
        "mean"
    ]
    assert f"quest {mean:.4f}" in (shown.text_content("#readout") or "")
    shown.select_option("#against", "bytes_ratio")
    x, y = lines_of(shown, "curve-error_norm")["quest"]
    rows = of(results.metrics, method="quest", **head).query("topk < 50")
    for got, metric in ((x, "bytes_ratio"), (y, "error_norm")):
        np.testing.assert_allclose(got, of(rows, metric=metric)["mean"], rtol=2e-5)


@pytest.mark.parametrize(("axis", "name"), [("position", "position"), ("distance", "prefix")])
def test_curves_against_position_and_distance(
    open_page: Open, results: Results, page_of_results: Path, axis: str, name: str
) -> None:
    shown = open_page(page_of_results)
    shown.select_option("#topk", "10")
    shown.select_option("#against", axis)
    assert name in (shown.locator("#curve-recall .xtitle").text_content() or "")
    rows = of(results.positions, axis=axis, topk=10)
    for metric in WITH_INTERVAL:
        wanted = of(rows, metric=metric).groupby(["method", "first"], observed=True)["mean"].mean()
        lines = lines_of(shown, f"curve-{metric}")
        assert set(lines) == set(results.methods())
        for method, (x, y) in lines.items():
            np.testing.assert_allclose(y, wanted[method], rtol=1e-3)
            # In the middle of the bucket, 0 left of 1.
            assert x == [0.5, 1, 5.5, 11.5, 767.5]
    shown.select_option("#layer", "3")
    shown.select_option("#head", "2")
    assert shown.text_content("#curves-title") == "Curves: layer 3, head 2, k = 10"
    rows = of(rows, layer=3, head=2, metric="recall")
    _, y = lines_of(shown, "curve-recall")["quest"]
    np.testing.assert_allclose(y, of(rows, method="quest")["mean"], rtol=1e-3)
    said = " ".join(shown.eval_on_selector("#curve-recall", "p => p.data.at(-1).text"))
    assert f"k = 10, {axis} 4 to 7 (5 queries)" in said
    shown.select_option("#topk", "50")  # which no query counts for
    assert lines_of(shown, "curve-recall") == {}
    assert "not measured here" in (shown.text_content("#curve-recall") or "")


def test_results_without_figures_by_position(open_page: Open, made: Make) -> None:
    shown = open_page({"r": made([0], 2, ["exact", "quest"], [5], [5])})
    shown.select_option("#against", "position")
    assert "an earlier version made them" in (shown.text_content("#curves-caption") or "")
    assert lines_of(shown, "curve-recall") == {}


def test_of_too_many_figures_there_are_means_over_heads(
    open_page: Open, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.analyze.outputs.report.along.FIGURES", len(results.positions) - 1)
    shown = open_page({"r": results})
    shown.select_option("#topk", "10")
    shown.select_option("#against", "position")
    shown.select_option("#layer", "3")
    shown.select_option("#head", "2")
    assert "means over heads only" in (shown.text_content("#curves-caption") or "")
    rows = of(results.positions, axis="position", topk=10, layer=3, metric="recall", method="quest")
    _, y = lines_of(shown, "curve-recall")["quest"]
    np.testing.assert_allclose(y, rows.groupby("first")["mean"].mean(), rtol=1e-3)


def test_the_front_is_of_what_nothing_beats(
    open_page: Open, results: Results, page_of_results: Path
) -> None:
    shown = open_page(page_of_results)
    lines = lines_of(shown, "cost-lost")
    front = list(zip(*lines.pop("Pareto front"), strict=True))
    assert set(lines) == {"exact", "quest", "loki:basis=own"}
    means = results.metrics.pivot_table("mean", ["method", "topk"], "metric", observed=True)
    points = [(r.bytes_ratio, 1 - r.attention_fraction) for r in means.dropna().itertuples()]
    best = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    np.testing.assert_allclose(front, sorted(best), rtol=1e-4)


def test_a_prefill_is_drawn_over_pairs(open_page: Open, results: Results) -> None:
    prefill = Results(results.metrics, results.curves, {**results.run, **PREFILL})
    shown = open_page({"r": prefill})
    means = prefill.metrics.pivot_table("mean", ["method", "topk"], "metric", observed=True)
    means = means.dropna().sort_values("compute_ratio")
    x, y = lines_of(shown, "cost-error_norm")["quest"]
    by_pairs = sorted(zip(x, y, strict=True))
    wanted = means.loc["quest", ["compute_ratio", "error_norm"]].to_numpy()
    np.testing.assert_allclose(by_pairs, wanted, rtol=1e-4)
    assert shown.text_content("#cost-error_norm-title") == "Error norm against pairs"
    assert "few pairs" in (shown.text_content("#cost-caption") or "")
    assert "pairs of full" in (shown.locator("#cost-lost .xtitle").text_content() or "")
    shown.select_option("#against", label="pairs")
    x, _ = lines_of(shown, "curve-error_norm")["quest"]
    np.testing.assert_allclose(sorted(x), wanted[:, 0], rtol=1e-4)


def test_runs_of_both_kinds_are_drawn_over_bytes(open_page: Open, results: Results) -> None:
    prefill = Results(results.metrics, results.curves, {**results.run, **PREFILL})
    shown = open_page({"a": results, "b": prefill})
    assert shown.text_content("#cost-lost-title") == "Lost attention mass against bytes"


def test_the_map_of_patterns(open_page: Open, made: Make, page_of_results: Path) -> None:
    assert not open_page(page_of_results).is_visible("#patterns")
    prefill = made(LAYERS, HEADS, ["quest"], [5], [5], patterns=True)
    prefill.run |= PREFILL
    shown = open_page({"r": prefill})
    rows = prefill.head_patterns.astype({"pattern": str})
    best = rows[rows["best"]]
    wanted = best.pivot(index="layer", columns="head", values="pattern").to_numpy()
    numbers, words = shown.eval_on_selector(
        "#map-patterns", "p => [p.data[0].z.map(r => [...r]), p.data[0].text]"
    )
    names = shown.eval_on_selector("#map-patterns", "p => p.data[0].colorbar.ticktext")
    assert [[names[i] for i in row] for row in numbers] == wanted.tolist()
    [own] = rows.query("layer == 3 and head == 2 and pattern == 'slash'")["mean"]
    assert f"{wanted[2][2]}<br>" in words[2][2] and f"best diagonals: {own:.4f}" in words[2][2]
    caption = shown.text_content("#patterns-caption") or ""
    for kind, count in best["pattern"].value_counts().items():
        assert f"{kind} {count} head" in caption
    shown.mouse.click(*cell_of(shown, "patterns", 3, 2))
    assert shown.text_content("#curves-title") == "Curves: layer 3, head 2"


def test_tables_sort(open_page: Open, page_of_results: Path) -> None:
    shown = open_page(page_of_results)
    head = shown.locator("#layers-table th", has_text="Recall").first
    for order in ("descending", "ascending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        figures = [number(row[2]) for row in rows_of(shown, "layers-table")]
        assert figures == sorted(figures, reverse=order == "descending")
    shown.select_option("#method", label="loki:basis=own")  # which keeps the order
    figures = [number(row[2]) for row in rows_of(shown, "layers-table")]
    assert figures == sorted(figures)


def test_the_keyboard_reaches_everything(open_page: Open, page_of_results: Path) -> None:
    shown = open_page(page_of_results)
    reached = []
    for _ in range(200):
        shown.keyboard.press("Tab")
        place = shown.evaluate(
            "() => { const e = document.activeElement, box = e.getBoundingClientRect();"
            " return [e.id || e.textContent, box.width * box.height, e.tagName] }"
        )
        if place[2] == "BODY":
            break
        assert place[1] > 0, place
        reached.append(place[0])
    assert len(reached) < 200
    assert reached[0] == "Skip to the figures"
    for name in (
        "method",
        "other",
        "metric",
        "topk",
        "maps",
        "layer",
        "head",
        "against",
        "show-all",
    ):
        assert name in reached
    assert {"Recall", "run.json, whole"} <= set(reached)
    shown.focus("#maps")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        shown.keyboard.press(key)
    assert (shown.text_content("#readout") or "").startswith("Layer 3, head 1 (model.layers.3")
    shown.keyboard.press("Enter")
    shown.locator("#curves-title", has_text="Curves: layer 3, head 1").wait_for()
    assert shown.evaluate("document.activeElement.id") == "curves-title"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page: Open, page_of_results: Path, scheme: str) -> None:
    shown = open_page(page_of_results, PHONE, color_scheme=scheme, is_mobile=True, has_touch=True)
    assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = [shown.locator(f"#map-{part}").bounding_box() for part in ("method", "other")]
    assert boxes[0] and boxes[1] and boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"] - 1
    shown.touchscreen.tap(*cell_of(shown, "other", 1, 4))
    assert shown.text_content("#curves-title") == "Curves: layer 1, head 4"


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of a colour rgb(r, g, b)."""
    parts = np.array([float(part) for part in colour[4:-1].split(",")]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_dark_and_light_are_readable(open_page: Open, page_of_results: Path) -> None:
    shown = open_page(page_of_results, color_scheme="light")
    for scheme, paper_is_bright in (("light", True), ("dark", False)):
        shown.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        paper = luminance(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 0.5) == paper_is_bright
        texts = ("#curve-recall .xtick text", "#curve-recall .ytitle")
        texts = (*texts, "#subtitle", "#layers-table td", "#legend-entries label")
        for text, property in ((t, "fill" if "curve" in t else "color") for t in texts):
            ink = luminance(
                shown.locator(text).first.evaluate(f"e => getComputedStyle(e).{property}")
            )
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, (scheme, text)
        for line in shown.locator("#curve-recall .lines path.js-line").all():
            if line.evaluate("e => getComputedStyle(e).strokeWidth") == "0px":
                continue  # a band's edge
            ink = luminance(line.evaluate("e => getComputedStyle(e).stroke"))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 2.2, (scheme, ink)


def test_names_are_shown_as_they_are(open_page: Open, made: Make) -> None:
    name = "</script><img src=x onerror='window.hacked=1'><b>bold</b>&amp;%{x}"
    results = made(LAYERS, HEADS, ["exact", name], TOPK, [5], task=name)
    results.metrics["module"] = name
    shown = open_page({name: results})
    shown.mouse.click(*cell_of(shown, "method", 1, 1))
    assert shown.text_content("h1") == name
    assert rows_of(shown, "methods-table")[1][0] == name
    assert name in (shown.text_content("#readout") or "")
    plot = shown.locator("#cost-lost")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".points path").last.bounding_box()
    assert point is not None
    shown.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    shown.wait_for_selector("#cost-lost .hovertext")
    label = "".join(shown.locator("#cost-lost .hovertext").first.all_text_contents())
    assert name.replace(" ", "") in label.replace(" ", "").replace("\xa0", "")
    assert shown.locator("img").count() == 0
    assert shown.evaluate("window.hacked") is None


@pytest.mark.parametrize(
    ("layers", "heads", "methods", "topk", "empty"),
    [
        ([0], 1, ["exact"], [1], []),
        ([0], 1, ["quest"], [5], [5]),
        # More methods than are drawn at first, which are ten.
        (range(80), 64, ["exact", *(f"method-{i}:of=many" for i in range(11))], [10, 50], []),
    ],
    ids=["smallest", "nothing-counts", "largest"],
)
def test_every_size(
    open_page: Open,
    made: Make,
    layers: list[int],
    heads: int,
    methods: list[str],
    topk: list[int],
    empty: list[int],
) -> None:
    more: dict[str, Any] = {"positions": [64, 128]} if heads == 1 else {}
    shown = open_page({"r": made(layers, heads, methods, topk, topk, empty=empty, **more)})
    assert len(rows_of(shown, "layers-table")) == len(layers)
    assert shown.evaluate("document.documentElement.scrollWidth") <= DESKTOP["width"]
    shown.click("#show-all")
    drawn = lines_of(shown, "curve-recall")
    assert set(drawn) == (set() if empty else set(methods))
    shown.select_option("#against", "position")
    drawn = lines_of(shown, "curve-recall")
    assert set(drawn) == (set(methods) if more and not empty else set())


def test_results_of_different_queries_are_told(open_page: Open, made: Make) -> None:
    first, second = (made([0, 1], 2, ["exact", "quest"], [5], [5], seed=s) for s in (1, 2))
    shown = open_page({"a": first, "b": second})
    assert shown.locator("#unlike").is_hidden()
    second.run["protocol"] = "prefix:64"
    shown = open_page({"a": first, "b": second})
    assert "differ in protocol" in (shown.text_content("#unlike") or "")
    shown.select_option("#method", label="b: quest")
    shown.select_option("#other", label="a: quest")
    assert shown.text_content("#map-difference-title") == "Difference: b: quest less a: quest"
    for caption in ("#heads-caption", "#comparison-caption", "#cost-caption"):
        assert "did not answer the same queries" in (shown.text_content(caption) or "")
    assert "Pareto front" not in lines_of(shown, "cost-lost")
    assert shown.locator("#subtitle span").all_text_contents()[1].startswith("b tiny")


def test_queries_of_one_place_are_told(open_page: Open, made: Make) -> None:
    everywhere, inside = (made([0], 2, ["exact"], [5], [5], seed=s) for s in (1, 2))
    inside.run |= {"where": "answer", "evidence": "needle", "min_context": 320}
    shown = open_page({"a": everywhere, "b": inside})
    assert "differ in least position, where: " in (shown.text_content("#unlike") or "")
    told = shown.locator("#subtitle span").all_text_contents()
    assert ", from position 10 k on" in told[0] and "in answer" not in told[0]
    assert ", in answer, from position 320 on" in told[1] and "evidence: needle" in told[1]


def test_how_many_queries_there_are(open_page: Open, page_of_results: Path) -> None:
    shown = open_page(page_of_results)
    assert "7,792 queries of each head" in (shown.text_content("#subtitle") or "").replace(
        "0 to ", ""
    )
    shown.select_option("#topk", "10")
    assert {row[-1] for row in rows_of(shown, "methods-table")} == {"7,792"}
    shown.select_option("#topk", "50")  # of which no query counts
    assert {row[-1] for row in rows_of(shown, "methods-table")} == {"0"}


def test_no_front_over_other_queries(open_page: Open, made: Make) -> None:
    """Each budget's own: the points of one method are over other queries already."""
    results = made([0], 2, ["quest", "window"], [5, 10], [5])
    shown = open_page({"r": results})
    assert "Pareto front" in lines_of(shown, "cost-lost")
    results.metrics.loc[results.metrics["topk"] == 10, "count"] -= 50
    shown = open_page({"r": results})
    assert "Pareto front" not in lines_of(shown, "cost-lost")
    assert "no Pareto front" in (shown.text_content("#cost-caption") or "")
    assert "may fall" in (shown.text_content("#curves-caption") or "")


def test_paper_holds_whole_tables(open_page: Open, made: Make) -> None:
    shown = open_page({"r": made(range(29), 2, ["exact", "quest"], [5], [5], sequences=True)})
    part = shown.locator("#layers .scroll")
    assert part.evaluate("e => e.scrollHeight > e.clientHeight")
    shown.emulate_media(media="print")
    shown.set_viewport_size({"width": 1046, "height": 718})  # of A4, lying, less its margins
    assert part.evaluate("e => e.scrollHeight <= e.clientHeight")
    assert part.evaluate("e => e.scrollWidth <= e.clientWidth")
    assert len(rows_of(shown, "layers-table")) == 29


@pytest.mark.skipif(
    "RETRACE_RESULTS" not in os.environ,
    reason="RETRACE_RESULTS names no results folder to make docs/report-*.png of",
)
def test_pictures(open_page: Open) -> None:
    """Those of the documentation, of real results with exact, quest and sparq at k = 64."""
    results = {"r": Results.load(os.environ["RETRACE_RESULTS"])}
    docs = Path(__file__).parents[4] / "docs"
    size = {"width": 1180, "height": 720}

    def picture(name: str, section: str, shown: Page, method: str, other: str) -> None:
        chosen = {"method": method, "other": other, "metric": "Attention fraction", "topk": "64"}
        for select, label in chosen.items():
            shown.select_option(f"#{select}", label=label)
        # The form above stays in sight, over what is scrolled under it.
        shown.evaluate(
            "id => window.scrollTo(0, document.getElementById(id).getBoundingClientRect().top"
            " + window.scrollY - document.getElementById('choice').offsetHeight)",
            section,
        )
        shown.wait_for_timeout(500)  # plots are drawn when they come into sight
        shown.screenshot(path=docs / f"report-{name}.png")

    picture("heads", "heads", open_page(results, size), "quest", "exact")
    picture("methods", "comparison", open_page(results, size), "sparq", "quest")
    dark = open_page(results, size, color_scheme="dark")
    picture("curves", "curves", dark, "sparq", "exact")


def test_keys_from_query_to_query(open_page: Open, results: Results) -> None:
    """A table where a run followed them; else nothing."""
    columns = ["method", "layer", "module", "cache", "head", "topk", "metric", "at", "mean"]
    rows = [
        (method, layer, "m", "group", 0, 10, metric, at, mean + layer / 10)
        for method, mean in (("exact", 0.25), ("quest", 0.625))
        for layer in (0, 1)
        for metric, at in (("repeated", 0), ("hit_rate", 512), ("hit_rate", 1024))
    ]
    followed = Results(results.metrics, results.curves, results.run)
    followed.locality = pd.DataFrame(rows, columns=columns).assign(count=1234)
    shown = open_page({"r": followed})
    assert shown.is_visible("#locality") and shown.is_visible("#locality-link")
    cells = rows_of(shown, "locality-0")
    assert [row[:3] for row in cells] == [["exact, 10", "1,234", "0.3000"],
                                          ["quest, 10", "1,234", "0.6750"]]  # fmt: skip
    assert cells[0][-2:] == ["more than 1,024", "-"]
    shown.click("#locality-0 thead th:nth-child(3) button")
    assert [row[0] for row in rows_of(shown, "locality-0")] == ["quest, 10", "exact, 10"]
    shown = open_page({"r": results})
    assert not shown.is_visible("#locality") and not shown.is_visible("#locality-link")


def test_tails_and_a_worst_query(made: Make, open_page: Open, tmp_path: Path) -> None:
    """Texts of tokens are shown as texts, and the command beside each worst query."""
    results = made([0, 1], 2, ["exact", "quest"], [5], range(1, 6))
    place = {"layer": [0, 1], "module": "m", "head": [1, 0], "topk": 5, "count": 9}
    figures = {"p5": 0.25, "p50": 0.5, "p95": 0.75, "worst": [0.125, 0.0625]}
    at = {"worst_sequence": [0, 1], "worst_position": [77, 88]}
    rows = {"method": "quest", "metric": "recall", **place, **figures, **at}
    results.tails = pd.DataFrame(rows)[list(TAIL_COLUMNS)].astype(TAIL_COLUMNS)
    key = {"rank": 1, "key": 3, "token": "<b>x</b>", "around": "a\nb", "probability": 0.5}
    picture = {
        "why": "quest, top-k 5", "place": "layer 1", "tokens": ["one ", "<i>two</i>"],
        "methods": ["quest", "exact"], "keys": [{**key, "taken": [False, True]}], "more": 2,
        "figures": [[5, 0, 0.0, 0.125, 0.25], [5, 1, 1.0, 0.5, 0.125]],
    }  # fmt: skip
    file = tmp_path / "report.html"
    file.write_text(page({"r": results}, [([picture], "no file")]), encoding="utf-8")
    shown = open_page(file)
    [row] = rows_of(shown, "tails-0")
    assert row[:7] == ["quest", "5", "Recall", "0.2500", "0.5000", "0.7500", "0.0625"]
    assert row[7:11] == ["1", "0", "1", "88"]
    command = "--layer 1 --head 0 --sequence 1 --position 88 --topk 5 --method quest"
    assert row[11].startswith(f"retrace show TRACE {command}")
    words = shown.locator("#worst").inner_text()
    assert "not drawn here: no file" in words and "one <i>two</i>" in words
    assert "<b>x</b> in a↵b" in words and "And 2 more of the best." in words
    cells = shown.locator("#worst tbody").first.locator("td").all_inner_texts()
    assert cells[1:] == ["1", "3", "0.5000", "missed", "taken"]


def test_no_tails(page_of_results: Path, open_page: Open) -> None:
    assert not open_page(page_of_results).locator("#tails").is_visible()
