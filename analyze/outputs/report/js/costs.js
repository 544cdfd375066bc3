// What methods' figures cost in bytes or in pairs computed, and which methods no other beats.
import { logarithmic } from "./axes.js";
import { methodsDrawn, scopeWords } from "./chosen.js";
import { curve } from "./curves.js";
import { at } from "./document.js";
import { figureWords, lineOf } from "./lines.js";
import { draw, nothing } from "./plot.js";
import { OTHERS, sameQueries } from "./queries.js";
import { COST, COUNTED, METRICS } from "./results.js";
import { theme } from "./style.js";
import { shown } from "./words.js";
/** @import { Point } from "./lines.js" */

/**
 * @typedef {object} Cost a plot: less is better
 * @property {string} id
 * @property {string} metric
 * @property {string} title
 * @property {string} axis
 * @property {(y: number) => number} of the metric
 */

/** @type {Cost[]} */
const COSTS = [
  {
    id: "cost-error_norm",
    metric: "error_norm",
    title: METRICS.error_norm.title,
    axis: METRICS.error_norm.axis,
    of: (y) => y,
  },
  {
    id: "cost-lost",
    metric: "attention_fraction",
    title: "Lost attention mass",
    axis: "1 − attention fraction",
    of: (y) => 1 - y,
  },
];

export function drawCosts() {
  at("cost-title").textContent = `Cost: ${scopeWords()}`;
  for (const cost of COSTS) drawCost(cost);
}

/** @param {Cost} cost */
function drawCost({ id, metric, title, axis, of }) {
  const lines = methodsDrawn().filter((entry) => !entry.derived).map((entry) => ({
    entry,
    points: curve(entry, metric, COST)
      .map(({ topk, asked, x, y }) => ({ topk, asked, x, y: of(y) })),
  })).filter(({ points }) => points.length);
  const measured = lines.flatMap(({ entry, points }) =>
    points.map(({ topk }) => ({ entry, topk }))
  );
  const alike = sameQueries(measured);
  at(`${id}-title`).textContent = `${title} against ${COUNTED}`;
  at("cost-caption").textContent = "A point is a budget, a line a method. " +
    (alike
      ? "The broad grey line is the Pareto front: of the methods drawn, none does better with as " +
        `few ${COUNTED}.`
      : `There is no Pareto front: the points ${OTHERS}, and a line may rise for that alone.`);
  const front = alike ? frontOf(lines.flatMap(({ points }) => points)) : [];
  const said = (/** @type {Point} */ point) =>
    `${figureWords(title)(point)}<br>${COUNTED} ${shown(point.x)}`;
  const traces = [
    ...(front.length ? [lineOfFront(front)] : []),
    ...lines.map(({ entry, points }) => lineOf(entry, points, said)),
  ];
  draw(id, traces, {
    xaxis: { title: { text: METRICS[COST].axis }, ...logarithmic(traces) },
    yaxis: { title: { text: axis }, rangemode: "tozero" },
    annotations: nothing(traces),
  });
}

/**
 * The points than which none has both a lower cost and a lower figure, by cost.
 * @param {Point[]} points
 */
function frontOf(points) {
  let least = Infinity;
  return points.toSorted((a, b) => a.x - b.x || a.y - b.y).filter(({ y }) => {
    const lower = y < least;
    least = Math.min(least, y);
    return lower;
  });
}

/** @param {Point[]} front */
const lineOfFront = (front) => ({
  type: "scatter",
  mode: "lines",
  name: "Pareto front",
  x: front.map((p) => p.x),
  y: front.map((p) => p.y),
  line: { color: theme("front"), width: 9, shape: "hv" },
  hoverinfo: "skip",
});
