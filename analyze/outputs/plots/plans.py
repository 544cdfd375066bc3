"""A plan as a map: what each kv head of each layer has."""

from pathlib import Path

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from retrace.analyze.outputs.plots.files import save_picture
from retrace.analyze.outputs.plots.style import styles_of
from retrace.analyze.plans.plan import FULL, Plan

FULL_COLOUR = "#BBBBBB"


def draw_plan(plan: Plan, file: str | Path) -> Path:
    """Draw the map of layers and kv heads into a file, PNG, SVG or PDF by its name; returns it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_picture(plan_map(plan), file)
    return file


def plan_map(plan: Plan) -> Figure:
    """The method, and beside it the budget, of every layer (rows) and kv head (columns)."""
    settings, layers = plan.settings, list(plan.layers)
    methods = list(dict.fromkeys(setting.method for setting in settings.values()))
    shape = len(layers), 1 + max(kv_head for _, kv_head in settings)
    chosen, budgets = np.full(shape, np.nan), np.full(shape, np.nan)
    for (layer, kv_head), setting in settings.items():
        at = layers.index(layer), kv_head
        chosen[at] = methods.index(setting.method)
        if not setting.full:
            budgets[at] = setting.topk if setting.fraction is None else setting.fraction
    height = 1.6 + 0.16 * len(layers)
    figure = Figure(figsize=(3 + 0.5 * shape[1] * 2, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = styles_of(methods)
    colours = [FULL_COLOUR if m == FULL else styles[m].colour for m in methods]
    edges = np.arange(len(methods) + 1) - 0.5
    norm = BoundaryNorm(list(edges), len(methods))
    left.imshow(chosen, cmap=ListedColormap(colours), norm=norm, aspect="auto")
    handles = [Patch(color=c, label=m) for c, m in zip(colours, methods, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", fontsize="small")
    left.set(title="method", xlabel="kv head", ylabel="layer")
    right.set(title="budget", xlabel="kv head")
    if np.isfinite(budgets).any():
        drawn = right.imshow(budgets, cmap="viridis", norm=LogNorm(), aspect="auto")
        figure.colorbar(drawn, ax=right)
    for axes in (left, right):
        axes.set_xticks(range(shape[1]))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize="x-small")
    return figure
