// Which queries figures are over: only methods that answered the same ones are compared.
import { grid, within } from "./figures.js";
import { runOf } from "./results.js";
import { extent } from "./statistics.js";
/** @import { Entry, Run } from "./results.js" */

export const OTHERS = "did not answer the same queries";
/** Facts that say which queries there are. */
const ASKED = ["trace", "protocol", "min_context", "where", "layers", "calibration"];

/**
 * The least and the most queries of any head of a method at a budget: none where not measured.
 * @param {Entry} entry
 * @param {number} topk
 */
export function queriesOf(entry, topk) {
  const counts = within(entry, grid(entry, "attention_fraction", topk, "count"));
  return counts.length ? extent(counts) : [];
}

/** @param {number[]} counts */
export const shownQueries = (counts) =>
  [...new Set(counts)].map((count) => count.toLocaleString("en")).join(" to ") || "–";

/**
 * What differs between results, in words.
 * @param {Run[]} runs
 */
export function unlikeWords(runs) {
  const told = (/** @type {string} */ name) =>
    runs.map((run) => JSON.stringify(run.facts[name] ?? null));
  return ASKED.filter((name) => new Set(told(name)).size > 1).join(", ")
    .replace("min_context", "least position");
}

/**
 * Whether methods answered the same queries, each at some budget.
 * @param {{entry: Entry, topk: number}[]} some
 */
export const sameQueries = (some) =>
  !unlikeWords(some.map(({ entry }) => runOf(entry))) &&
  new Set(some.map(({ entry, topk }) => String(queriesOf(entry, topk)))).size < 2;

/**
 * Whether each budget has queries of its own, as nothing said from which position on they count.
 * @param {Run} run
 */
export const byBudgetAlone = ({ facts }) => (facts.min_context ?? null) === null;

/** Which queries count. @param {Run} run */
export const countedWords = (run) =>
  `${run.facts.where ? `in ${run.facts.where}, ` : ""}from position ` +
  `${byBudgetAlone(run) ? "10 k" : run.facts.min_context} on`;
