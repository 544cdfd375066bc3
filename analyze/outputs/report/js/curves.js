// Curves of metrics over budgets, over what they cost, and over the queries' place.
import { bucketsAlong, bucketWords, inBuckets } from "./along.js";
import { axisOf, doubling, logarithmic } from "./axes.js";
import {
  chosen,
  endsInScope,
  inScope,
  isChosen,
  methodChosen,
  methodsDrawn,
  scopeWords,
} from "./chosen.js";
import { at } from "./document.js";
import { grid, gridAt } from "./figures.js";
import { bandBetween, bandOfIntervals, figureWords, intervalWords, lineOf } from "./lines.js";
import { draw, nothing } from "./plot.js";
import { byBudgetAlone, countedWords } from "./queries.js";
import { COST, CURVED, METRICS, runOf } from "./results.js";
import { mean, quantile } from "./statistics.js";
/** @import { Ends, Entry, Run } from "./results.js" */

/** What curves are drawn over. @type {Record<string, {title: string, words: string}>} */
const AGAINST = {
  topk: { title: "budget k (keys per query and head)", words: "the budget" },
  density: { title: METRICS.density.axis, words: METRICS.density.description },
  [COST]: { title: METRICS[COST].axis, words: METRICS[COST].description },
  position: { title: "position of the query", words: "the query's position" },
  distance: {
    title: "distance from the index's prefix",
    words: "the query's distance from the prefix that a state may be built from",
  },
};

/**
 * The points of a method's curve within the scope.
 * @param {Entry} entry
 * @param {string} metric
 * @param {string} against
 * @param {(values: number[]) => number} of its y from the figures of a point
 */
export function curve(entry, metric, against, of = mean) {
  const points = inBuckets(against)
    ? bucketsAlong(entry, metric, against)
    : byBudget(entry, metric, against);
  return points.filter((point) => point.values.length)
    .map((point) => ({ ...point, y: of(point.values) }))
    .filter(({ x, y }) => Number.isFinite(x) && Number.isFinite(y));
}

/** @typedef {{topk: number, asked: boolean, x: number, values: number[], ends?: Ends}} AtBudget */

/**
 * At the budgets asked for and, where those are the axis, between them.
 * @param {Entry} entry
 * @param {string} metric
 * @param {string} against
 */
function byBudget(entry, metric, against) {
  const points = /** @type {Map<number, AtBudget>} */ (new Map());
  if (against === "topk") {
    (entry.curves[metric] ?? []).forEach((place, i) => {
      const topk = entry.curve_topk[i];
      if (place === null) return;
      const values = inScope(entry, gridAt(entry, place));
      points.set(topk, { topk, asked: false, x: topk, values });
    });
  }
  for (const topk of entry.topk) {
    points.set(topk, {
      topk,
      asked: true,
      x: against === "topk" ? topk : mean(inScope(entry, grid(entry, against, topk))),
      values: inScope(entry, grid(entry, metric, topk)),
      ends: endsInScope(entry, metric, topk),
    });
  }
  return [...points.values()].sort((a, b) => a.topk - b.topk);
}

export function drawCurves() {
  const { against, topk } = chosen, method = methodChosen(), buckets = inBuckets(against);
  const spreads = curve(method, "attention_fraction", against)
    .some((point) => point.values.length > 1);
  at("curves-title").textContent = `Curves: ${scopeWords()}${buckets ? `, k = ${topk}` : ""}`;
  at("curves-caption").textContent = captionOf(spreads);
  for (const metric of CURVED) {
    const traces = tracesOf(metric, spreads);
    draw(`curve-${metric}`, traces, {
      xaxis: {
        title: { text: AGAINST[against].title },
        ...(buckets ? doubling(traces) : logarithmic(traces, against === "topk")),
      },
      yaxis: axisOf(METRICS[metric]),
      annotations: nothing(traces),
    });
  }
}

/**
 * The band of heads lowest, then those of intervals, then lines.
 * @param {string} metric
 * @param {boolean} spreads whether points are of several heads
 */
function tracesOf(metric, spreads) {
  const { against } = chosen, method = methodChosen();
  const edge = (/** @type {number} */ share) =>
    curve(method, metric, against, (values) => quantile(values, share));
  const bands = spreads ? bandBetween(method, edge(0.1), edge(0.9)) : [], lines = [];
  for (const entry of methodsDrawn()) {
    const points = curve(entry, metric, against);
    if (points.length) lines.push(lineOf(entry, points, figureWords(METRICS[metric].title)));
    if (isChosen(entry)) bands.push(...bandOfIntervals(entry, points));
  }
  return [...bands, ...lines];
}

/** @param {boolean} spreads */
function captionOf(spreads) {
  const { against, topk } = chosen, method = methodChosen(), run = runOf(method);
  const buckets = inBuckets(against);
  const known = !buckets && CURVED.some((metric) => endsInScope(method, metric, topk));
  const means = buckets && run.along.heads < run.heads;
  return `Against ${AGAINST[against].words}; ` +
    (buckets ? bucketWords(run, against) : budgetWords(run)) +
    (spreads
      ? ` The ${known ? "pale band" : "band"} is 10 to 90 % of the ` +
        `${means ? "layers' means" : "heads"} under ${method.label}.`
      : "") +
    (known ? ` ${intervalWords()}` : "");
}

/**
 * What the points are, and which queries a run's figures are over.
 * @param {Run} run
 */
const budgetWords = (run) =>
  "markers are the budgets asked for; where a method's choices nest, its line goes through the " +
  "budgets between them. " +
  (byBudgetAlone(run)
    ? `Each k has queries of its own, ${countedWords(run)}, so a curve may fall.`
    : `All budgets have the same queries, ${countedWords(run)}.`);
