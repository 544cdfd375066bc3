// Tables of methods: all of them, and one against another.
import { alikeChosen, chosen, methodChosen, otherChosen } from "./chosen.js";
import { at } from "./document.js";
import { differencesOf, overall } from "./figures.js";
import { interval, intervalOfDifference, sequencesWords } from "./intervals.js";
import { OTHERS, queriesOf, shownQueries } from "./queries.js";
import { index, METRICS, runOf } from "./results.js";
import { mean, quantile } from "./statistics.js";
import { figureCell, tabulate } from "./tables.js";
import { shown, shownEnds } from "./words.js";
/** @import { Entry, Metric } from "./results.js" */

export function tabulateMethods() {
  const { topk } = chosen, served = new Set(index.runs.map((run) => run.served));
  const known = index.runs.some((run) => Object.keys(run.intervals).length);
  const intervals = known
    ? `, in brackets their 95 % intervals over ${sequencesWords()}, taken as drawn from all that ` +
      "there could be, their means as skewed as exponential ones at the most"
    : ", without intervals, which take more than one sequence";
  at("overview-caption").textContent =
    `Means over layers and heads at k = ${topk}${intervals}. Bytes are those read over those of ` +
    `full attention, ${[...served].join(" or ")}. Compare methods at equal bytes, not only at ` +
    `equal k. ${index.predicts}`;
  const columns = [
    { title: "Method", words: true },
    ...Object.values(METRICS).map(({ title }) => ({ title })),
    { title: "Queries" },
  ];
  const rows = index.entries.map((entry, i) => {
    const figures = Object.keys(METRICS).map((metric) => ({
      ...figureCell(overall(entry, metric, topk)),
      ends: interval(entry, metric, topk),
    }));
    const counts = queriesOf(entry, topk);
    const queries = { text: shownQueries(counts), order: counts[0] ?? NaN };
    return { marked: i === chosen.method, cells: [entry.label, ...figures, queries] };
  });
  tabulate("methods-table", columns, rows);
}

export function tabulateComparison() {
  const { topk } = chosen, method = methodChosen(), other = otherChosen();
  at("comparison").hidden = !other;
  if (!other) return;
  at("comparison-title").textContent = `${method.label} against ${other.label} at k = ${topk}`;
  at("comparison-caption").textContent =
    `Differences are head by head, ${method.label} less ${other.label}; bytes are those read ` +
    "over those of full attention." +
    (alikeChosen() ? "" : ` They ${OTHERS}: the differences are not the methods' alone.`) +
    wordsOfIntervals(method, other);
  const columns = [
    { title: "Metric", words: true },
    { title: method.label },
    { title: other.label },
    { title: "Mean difference" },
    { title: "95 % interval of it" },
    { title: "10 to 90 % of heads" },
    { title: `Heads where ${method.label} is better` },
  ];
  const rows = Object.entries(METRICS)
    .map(([metric, info]) => ({ cells: cellsOf(method, other, metric, info) }));
  tabulate("comparison-table", columns, rows);
}

/** @param {Entry} method @param {Entry} other */
function wordsOfIntervals(method, other) {
  if (method.run !== other.run) return " Methods of different results have no interval.";
  if (!Object.keys(runOf(method).differences).length) return "";
  return ` The interval is that of the mean difference over pairs of the same ${sequencesWords()}:` +
    " where it leaves out zero, the difference is more than the choice of sequences explains.";
}

/**
 * The comparison of two methods by one metric.
 * @param {Entry} method
 * @param {Entry} other
 * @param {string} metric
 * @param {Metric} info
 */
function cellsOf(method, other, metric, { title, better }) {
  const { topk } = chosen, ends = intervalOfDifference(method, other, metric, topk);
  const differences = differencesOf(method, other, metric, topk)
    .filter((value) => !Number.isNaN(value));
  const low = quantile(differences, 0.1), high = quantile(differences, 0.9);
  const none = { text: "–", order: NaN }, some = differences.length > 0;
  const count = differences.filter((value) => value * better > 0).length;
  return [
    title,
    figureCell(overall(method, metric, topk)),
    figureCell(overall(other, metric, topk)),
    figureCell(mean(differences), true),
    ends ? { text: shownEnds(ends, true), order: ends[0] } : none,
    some ? { text: `${shown(low, true)} to ${shown(high, true)}`, order: high - low } : none,
    some && better ? { text: `${count} of ${differences.length}`, order: count } : none,
  ];
}
