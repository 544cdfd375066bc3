// A metric by layer: a plot of all methods drawn, and a table of the chosen one.
import { axisOf } from "./axes.js";
import { chosen, isChosen, methodChosen, methodsDrawn, otherChosen } from "./chosen.js";
import { at } from "./document.js";
import { grid, within } from "./figures.js";
import { endsWithin } from "./intervals.js";
import { bandBetween, bandOfIntervals, figureWords, intervalWords, lineOf } from "./lines.js";
import { draw, nothing } from "./plot.js";
import { index, METRICS, runOf } from "./results.js";
import { extent, mean, spread } from "./statistics.js";
import { figureCell, tabulate } from "./tables.js";
/** @import { Entry } from "./results.js" */

export function drawLayers() {
  const { metric, topk } = chosen, info = METRICS[metric], method = methodChosen();
  const layers = index.runs.flatMap((run) => run.layers), [least, most] = extent(layers);
  const traces = methodsDrawn().flatMap(tracesOfLayers);
  const known = runOf(method).layers
    .some((layer) => endsWithin(method, metric, topk, layer, null));
  at("layers-title").textContent = `${info.title} by layer at k = ${topk}`;
  at("layers-caption").textContent =
    "Mean over a layer's heads; the pale band is one standard deviation across the heads of " +
    `${method.label}.${known ? ` ${intervalWords()}` : ""}`;
  draw("layers-plot", traces, {
    xaxis: {
      title: { text: "layer" },
      tickformat: "d",
      range: [least - 0.5, most + 0.5],
      ...(layers.length > 16 ? { nticks: 16 } : { dtick: 1 }),
    },
    yaxis: axisOf(info),
    annotations: nothing(traces),
  });
}

/** @param {Entry} entry */
function tracesOfLayers(entry) {
  const { metric, topk } = chosen, info = METRICS[metric], { layers } = runOf(entry);
  const values = grid(entry, metric, topk);
  if (!values) return [];
  const points = layers.map((layer) => ({ layer, heads: within(entry, values, layer) }))
    .filter(({ heads }) => heads.length)
    .map(({ layer, heads }) => ({
      topk,
      asked: layers.length <= 40,
      x: layer,
      y: mean(heads),
      std: spread(heads),
      at: `k = ${topk}, layer ${layer}`,
      ends: endsWithin(entry, metric, topk, layer, null),
    }));
  const edge = (/** @type {1 | -1} */ sign) =>
    points.map(({ x, y, std }) => ({
      x,
      y: Math.max(0, Math.min(info.most ?? Infinity, y + sign * std)),
    }));
  return [
    ...(entry === methodChosen() ? bandBetween(entry, edge(-1), edge(1)) : []),
    ...(isChosen(entry) ? bandOfIntervals(entry, points) : []),
    lineOf(entry, points, figureWords(info.title)),
  ];
}

export function tabulateLayers() {
  const { metric, topk } = chosen, method = methodChosen(), other = otherChosen();
  const run = runOf(method), known = Object.keys(run.ends.layer).length > 0;
  at("layers-table-title").textContent =
    `Layers under ${method.label} at k = ${topk}: mean ± standard deviation across heads` +
    (known ? " [95 % interval over sequences]" : "");
  const metrics = Object.keys(METRICS).filter((name) => grid(method, name, topk));
  const columns = [
    { title: "Layer" },
    { title: "Module", words: true },
    ...metrics.map((name) => ({ title: METRICS[name].title })),
  ];
  if (other) columns.push({ title: `${METRICS[metric].title}, difference to ${other.label}` });
  const headsOf = (
    /** @type {Entry} */ entry,
    /** @type {string} */ name,
    /** @type {number} */ layer,
  ) => within(entry, grid(entry, name, topk), layer);
  const rows = run.layers.map((layer, row) => {
    const cells = metrics.map((name) => {
      const heads = headsOf(method, name, layer), figure = figureCell(mean(heads));
      if (!heads.length) return figure;
      return { ...figure, std: spread(heads), ends: endsWithin(method, name, topk, layer, null) };
    });
    if (other) {
      const less = mean(headsOf(other, metric, layer));
      cells.push(figureCell(mean(headsOf(method, metric, layer)) - less, true));
    }
    return { marked: layer === chosen.layer, cells: [layer, run.modules[row], ...cells] };
  });
  tabulate("layers-table", columns, rows);
}
