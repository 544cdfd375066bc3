// Methods' lines, and the bands around them.
import { chosen } from "./chosen.js";
import { sequencesWords } from "./intervals.js";
import { index } from "./results.js";
import { colourOf, DASHES, MARKERS, translucent } from "./style.js";
import { besideEnds, shown } from "./words.js";
/** @import { Ends, Entry } from "./results.js" */

/**
 * @typedef {object} Point
 * @property {number} x
 * @property {number} y
 * @property {number} topk
 * @property {boolean} asked whether it is of a budget asked for, and so has a marker
 * @property {string} [at] what is said of its place, where that is not its budget
 * @property {Ends} [ends] of its interval
 * @property {number} [std] across heads
 */

const UNSEEN = { type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip" };

/**
 * @param {Entry} entry
 * @param {Point[]} points
 * @param {(point: Point) => string} said of a point's figure
 */
export function lineOf(entry, points, said) {
  const number = index.entries.indexOf(entry), colour = colourOf(entry), name = plain(entry.label);
  const first = number === chosen.method, second = number === chosen.other;
  return {
    type: "scatter",
    mode: "lines+markers",
    name,
    x: points.map((p) => p.x),
    y: points.map((p) => p.y),
    line: {
      color: colour,
      dash: DASHES[entry.style.dashes][0],
      width: first ? 3 : second ? 2.5 : 1.4,
    },
    marker: {
      color: colour,
      symbol: MARKERS[entry.style.marker][0],
      opacity: 1,
      line: { width: 0 },
      size: points.map((p) => (p.asked ? (first ? 8 : 6) : 0)),
    },
    text: points.map((p) => `${name}<br>${p.at ?? `k = ${p.topk}`}<br>${said(p)}`),
    hovertemplate: "%{text}<extra></extra>",
    opacity: first || second ? 1 : 0.8,
  };
}

/**
 * A point's figure as it is said when nothing else is.
 * @param {string} title
 */
export const figureWords = (title) => (/** @type {Point} */ { y, ends, std }) =>
  `${title.toLowerCase()} ${shown(y)}${besideEnds(ends)}` +
  (std === undefined ? "" : ` (std ${shown(std)})`);

/**
 * The pale band between two lines.
 * @param {Entry} entry
 * @param {{x: number, y: number}[]} low
 * @param {{x: number, y: number}[]} high
 */
export function bandBetween(entry, low, high) {
  if (!low.length) return [];
  const [lower, upper] = [low, high].map((points) => ({
    ...UNSEEN,
    x: points.map((p) => p.x),
    y: points.map((p) => p.y),
  }));
  return [lower, { ...upper, fill: "tonexty", fillcolor: translucent(entry, 0.14) }];
}

/**
 * The darker band of the intervals that points have.
 * @param {Entry} entry
 * @param {Point[]} points
 */
export function bandOfIntervals(entry, points) {
  const some = points.flatMap(({ x, ends }) => ends ? [{ x, low: ends[0], high: ends[1] }] : []);
  if (some.length < 2) return [];
  const back = some.toReversed();
  return [{
    ...UNSEEN,
    fill: "toself",
    fillcolor: translucent(entry, 0.3),
    meta: "interval",
    x: [...some, ...back].map((p) => p.x),
    y: [...some.map((p) => p.low), ...back.map((p) => p.high)],
  }];
}

export const intervalWords = () =>
  `The darker bands are 95 % intervals of ${
    chosen.other === null ? "its mean" : "both chosen methods' means"
  } over ${sequencesWords()}.`;

/**
 * Text that Plotly, which reads some HTML, shows as it is; long specs in lines.
 * @param {string} text
 */
function plain(text, width = 44) {
  const lines = [""];
  for (const part of text.split(/(?<=[,:/ ])/)) {
    const line = lines[lines.length - 1];
    if (line && (line + part).length > width) lines.push(part);
    else lines[lines.length - 1] = line + part;
  }
  const escaped = (/** @type {string} */ line) =>
    line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return lines.map(escaped).join("<br>");
}
