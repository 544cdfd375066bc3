"""Axes: there are numbers on them, and rounding is not painted as a difference."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retrace.analyze.outputs.plots.style import LEAST_SPAN, MOST_TICKS, logarithmic, plain_numbers


@pytest.mark.parametrize(
    "values",
    [[0.3, 0.31], [0.0016, 0.002], [1e-4, 2.0], [1e-4, 1e6], [5, 80], [0.5, 0.5]],
    ids=str,
)
@pytest.mark.parametrize("across", [True, False])
def test_a_logarithmic_axis_has_numbers(values: list[float], across: bool) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(*((values, [1, 2]) if across else ([1, 2], values)))
    axis = axes.xaxis if across else axes.yaxis
    logarithmic(axis)
    FigureCanvasAgg(figure).draw()
    shown = [label.get_text() for label in axis.get_ticklabels()]
    assert 2 <= len(shown) <= MOST_TICKS and len(set(shown)) == len(shown)
    low, high = sorted(axis.get_view_interval())
    assert all(low <= float(text) <= high for text in shown)
    assert low < min(values) and high > max(values)


@pytest.mark.parametrize("value", [0.7, 1.0, 0.0, 120.0])
def test_rounding_is_no_difference(value: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [value, value + 1e-10])
    plain_numbers(axes)
    FigureCanvasAgg(figure).draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
    low, high = axes.get_ylim()
    assert high - low >= 0.999 * LEAST_SPAN and low <= value <= high
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(shown)) == len(shown)


def test_a_wide_range_is_left_alone() -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], [0.1, 0.5])
    before = axes.get_ylim()
    plain_numbers(axes)
    assert axes.get_ylim() == before
