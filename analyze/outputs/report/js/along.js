// Figures by position and by distance, bucket by bucket of the queries.
import { chosen } from "./chosen.js";
import { figuresAt, within } from "./figures.js";
import { runOf } from "./results.js";
import { countedQueries } from "./words.js";
/** @import { Entry, Run } from "./results.js" */

/** @param {string} against */
export const inBuckets = (against) => against === "position" || against === "distance";

/**
 * A method's figures within the scope at the chosen budget, by bucket of an axis.
 * @param {Entry} entry
 * @param {string} metric
 * @param {string} axis
 */
export function bucketsAlong(entry, metric, axis) {
  const run = runOf(entry), { topk, layer } = chosen;
  const start = entry.along[axis]?.[metric]?.[topk];
  if (start === undefined) return [];
  const { heads, axes } = run.along, { firsts, queries } = axes[axis];
  const head = heads < run.heads ? null : chosen.head, size = run.layers.length * heads;
  return firsts.map((first, i) => {
    const last = Math.max(first, 2 * first - 1);
    const numbers = `${axis} ${first === last ? first : `${first} to ${last}`}`;
    return {
      topk,
      asked: true,
      x: Math.max(0.5, (first + last) / 2),
      values: within(entry, figuresAt(start + i * size, size), layer, head, heads),
      at: `k = ${topk}, ${numbers} (${countedQueries(queries[topk][i])})`,
    };
  });
}

/**
 * What the buckets of an axis are, and what of them the page does not hold.
 * @param {Run} run
 * @param {string} axis
 */
export function bucketWords(run, axis) {
  const { axes, heads } = run.along, { protocol = "all" } = run.facts;
  if (!axes[axis]) return "these results hold no figures by it: an earlier version made them.";
  const from = protocol.startsWith("prefix")
    ? `A distance is counted from the prefix of the protocol ${protocol}.`
    : `Under the protocol ${protocol} a distance is counted from where fitted states were last ` +
      "built anew; methods that fit nothing do not depend on it.";
  return "a marker is the mean of a bucket of queries, each twice as long as the one before." +
    (axis === "distance" ? ` ${from}` : "") +
    (heads < run.heads ? " Of so many figures the page holds means over heads only." : "");
}
