// Heat maps of layers by heads: the method, the one it is compared with, and their difference.
import { every } from "./axes.js";
import { alikeChosen, chosen, methodChosen, otherChosen } from "./chosen.js";
import { at } from "./document.js";
import { cell, differencesOf, grid } from "./figures.js";
import { endsWithin } from "./intervals.js";
import { draw, onClick, reshape } from "./plot.js";
import { OTHERS } from "./queries.js";
import { METRICS, runOf } from "./results.js";
import { quantile } from "./statistics.js";
import { theme } from "./style.js";
import { besideEnds, countedQueries, shown } from "./words.js";
/** @import { Ends, Entry } from "./results.js" */
/** @import { Grid } from "./figures.js" */
/** @import { Values } from "./statistics.js" */

/** @typedef {"method" | "other" | "difference"} Part */

/**
 * @typedef {object} HeatMap
 * @property {Entry} entry whose layers and heads it has
 * @property {Grid} values
 * @property {string} words of a figure
 * @property {Scale} scale
 * @property {(layer: number, head: number) => Ends | undefined} [ends] of a head's interval
 * @property {(layer: number, head: number) => string} [told] of a head, in place of a figure
 */

/**
 * @typedef {object} Scale
 * @property {string | [number, string][]} colours
 * @property {number} least
 * @property {number} most
 * @property {string} title
 * @property {boolean} [signed]
 * @property {string[]} [names] of the numbers from 0 on, where they are no figures
 */

/** @type {[number, string][]} */
const DIVERGING = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"]
  .map((colour, i) => [i / 6, colour]);

export function drawMaps() {
  const { metric, topk } = chosen, info = METRICS[metric];
  at("heads-caption").textContent =
    `${info.title} (${info.description}) at k = ${topk}, mean over the queries that count. ` +
    "Choose a cell for that head's curves; with the keyboard, arrows move and Enter goes there." +
    (info.most ? "" : " Colours end where 2 % of the heads lie beyond.") +
    (alikeChosen()
      ? ""
      : ` The two methods ${OTHERS}: their difference is not the methods' alone.`);
  const method = methodChosen(), other = otherChosen();
  const first = grid(method, metric, topk), second = other && grid(other, metric, topk);
  const both = [...(first ?? []), ...(second ?? [])].filter(Number.isFinite);
  const scale = {
    colours: "Viridis",
    least: 0,
    most: info.most ?? (end(both) || 1),
    title: info.axis,
  };
  showFigures("method", method, first, scale);
  showFigures("other", other, second, scale);
  showDifference(method, other, Boolean(first && second));
  sayHead();
}

/**
 * @param {Part} part
 * @param {Entry | null} entry
 * @param {Grid | null} values
 * @param {Scale} scale
 */
function showFigures(part, entry, values, scale) {
  const { metric, topk } = chosen, id = `map-${part}`;
  inView(part, Boolean(entry));
  if (!entry) return;
  at(id).hidden = !values;
  at(`${id}-title`).textContent = values
    ? entry.label
    : `${entry.label}: not measured at k = ${topk}`;
  if (!values) return;
  drawMap(id, {
    entry,
    values,
    words: METRICS[metric].title.toLowerCase(),
    scale,
    ends: (layer, head) => endsWithin(entry, metric, topk, layer, head),
  });
}

/** @param {Entry} method @param {Entry | null} other @param {boolean} measured whether both were */
function showDifference(method, other, measured) {
  inView("difference", measured);
  if (!other || !measured) return;
  const { metric, topk } = chosen, values = differencesOf(method, other, metric, topk);
  const sizes = values.filter(Number.isFinite).map(Math.abs);
  const most = Math.max(0.01, METRICS[metric].most ? quantile(sizes, 1) || 0 : end(sizes));
  at("map-difference-title").textContent = `Difference: ${method.label} less ${other.label}`;
  drawMap("map-difference", {
    entry: method,
    values,
    words: "difference",
    scale: { colours: DIVERGING, least: -most, most, title: "difference", signed: true },
  });
}

/** @param {Part} part @param {boolean} seen */
function inView(part, seen) {
  at(`map-${part}`).hidden = !seen;
  /** @type {HTMLElement} */ (at(`map-${part}`).parentElement).hidden = !seen;
}

/**
 * Where a scale of colours ends, so that a few heads far off do not take it all.
 * @param {Values} values
 */
const end = (values) => quantile(values, 0.98) || 0;

/** @param {string} id @param {HeatMap} map */
export function drawMap(id, { entry, values, words, scale, ends = () => undefined, told }) {
  const { layers, heads } = runOf(entry);
  const rows = layers.map((_, row) => values.slice(row * heads, (row + 1) * heads));
  const said = (
    /** @type {number} */ value,
    /** @type {number} */ layer,
    /** @type {number} */ head,
  ) =>
    `layer ${layer}, head ${head}<br>` +
    (told?.(layer, head) ??
      `${words} ${Number.isNaN(value) ? "no query counts" : shown(value, scale.signed)}` +
        besideEnds(ends(layer, head)));
  at(id).style.height = `${Math.min(Math.max(layers.length * 11, 130), 900) + 80}px`;
  draw(id, [{
    type: "heatmap",
    z: rows,
    text: rows.map((row, i) => Array.from(row, (value, head) => said(value, layers[i], head))),
    hovertemplate: "%{text}<extra></extra>",
    hoverongaps: false,
    xgap: heads <= 32 ? 1 : 0,
    ygap: layers.length <= 40 ? 1 : 0,
    colorscale: scale.colours,
    zmin: scale.least,
    zmax: scale.most,
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      tickfont: { size: 11 },
      ...(scale.names && { tickvals: [...scale.names.keys()], ticktext: scale.names }),
      title: { text: scale.title, side: "right", font: { size: 11 } },
    },
  }], {
    plot_bgcolor: theme("empty"),
    shapes: mark(entry),
    xaxis: {
      title: { text: "head" },
      ...every([...Array(heads).keys()]),
      showgrid: false,
      zeroline: false,
      range: [-0.5, heads - 0.5],
    },
    yaxis: {
      title: { text: "layer" },
      ...every(layers),
      showgrid: false,
      zeroline: false,
      range: [layers.length - 0.5, -0.5],
    },
  });
}

/**
 * A box around the chosen head, or around its whole row or column.
 * @param {Entry} entry
 */
function mark(entry) {
  const { layers, heads } = runOf(entry), column = chosen.head;
  const row = chosen.layer === null ? -1 : layers.indexOf(chosen.layer);
  if (row < 0 && column === null) return [];
  const [x0, x1] = column === null ? [-0.5, heads - 0.5] : [column - 0.5, column + 0.5];
  const [y0, y1] = row < 0 ? [-0.5, layers.length - 0.5] : [row - 0.5, row + 0.5];
  const box = { type: "rect", x0, x1, y0, y1 };
  return [
    { ...box, line: { color: "#000000", width: 4 } },
    { ...box, line: { color: "#ffffff", width: 2 } },
  ];
}

/** Mark the head that is chosen now, and say its figures. */
export function markHead() {
  const method = methodChosen(), other = otherChosen();
  reshape("map-method", mark(method));
  reshape("map-patterns", mark(method));
  if (other) reshape("map-other", mark(other));
  if (other) reshape("map-difference", mark(method));
  sayHead();
}

/**
 * Call back with the layer and head of a cell that is clicked.
 * @param {(layer: number, head: number) => void} clicked
 */
export function onCell(clicked) {
  const layersIn = {
    method: () => runOf(methodChosen()).layers,
    other: () => runOf(otherChosen() ?? methodChosen()).layers,
    difference: () => runOf(methodChosen()).layers,
    patterns: () => runOf(methodChosen()).layers,
  };
  for (const [part, layers] of Object.entries(layersIn)) {
    onClick(`map-${part}`, ({ x, y }) => clicked(layers()[y], x));
  }
}

function sayHead() {
  const { metric, topk, layer, head } = chosen, method = methodChosen(), other = otherChosen();
  if (layer === null || head === null) {
    at("readout").textContent = "No head is chosen.";
    return;
  }
  const say = (/** @type {Entry} */ entry) => {
    const value = cell(entry, grid(entry, metric, topk), layer, head);
    if (Number.isNaN(value)) return `${entry.label} –`;
    const std = cell(entry, grid(entry, metric, topk, "std"), layer, head);
    const ends = besideEnds(endsWithin(entry, metric, topk, layer, head));
    return `${entry.label} ${shown(value)}${ends} (std ${shown(std)} over queries)`;
  };
  const queries = cell(method, grid(method, metric, topk, "count"), layer, head);
  at("readout").textContent = `Layer ${layer}, head ${head} (${moduleOf(method, layer)}), ` +
    `${METRICS[metric].title.toLowerCase()} at k = ${topk}: ` +
    (other ? [method, other] : [method]).map(say).join("; ") +
    (queries > 0 ? `; ${countedQueries(queries)}.` : ".");
}

/** @param {Entry} entry @param {number} layer */
function moduleOf(entry, layer) {
  const { modules, layers } = runOf(entry);
  return modules[layers.indexOf(layer)] ?? "";
}
