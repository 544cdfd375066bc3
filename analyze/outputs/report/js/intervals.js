// 95 % intervals over sequences; undefined where they are unknown.
import { figuresAt } from "./figures.js";
import { index, runOf } from "./results.js";
/** @import { Ends, Entry } from "./results.js" */

/**
 * Of a method's mean over layers and heads.
 * @param {Entry} entry
 * @param {string} metric
 * @param {number} topk
 */
export const interval = (entry, metric, topk) =>
  entry.derived ? undefined : runOf(entry).intervals[entry.method]?.[metric]?.[topk];

/**
 * Of a layer's mean over heads, or of a head; of all layers where that is null.
 * @param {Entry} entry
 * @param {string} metric
 * @param {number} topk
 * @param {number | null} layer
 * @param {number | null} head
 * @returns {Ends | undefined}
 */
export function endsWithin(entry, metric, topk, layer, head) {
  if (layer === null) return head === null ? interval(entry, metric, topk) : undefined;
  const run = runOf(entry), row = run.layers.indexOf(layer), heads = head === null ? 1 : run.heads;
  const start = run.ends[head === null ? "layer" : "head"][entry.method]?.[metric]?.[topk];
  if (entry.derived || start === undefined || row < 0 || (head ?? 0) >= heads) return undefined;
  const size = run.layers.length * heads, place = row * heads + (head ?? 0);
  const both = figuresAt(start, 2 * size), low = both[place], high = both[size + place];
  return Number.isNaN(low) || Number.isNaN(high) ? undefined : [low, high];
}

/**
 * Of a method's mean less another's: both must have answered the same sequences of one run.
 * @param {Entry} entry
 * @param {Entry} other
 * @param {string} metric
 * @param {number} topk
 * @returns {Ends | undefined}
 */
export function intervalOfDifference(entry, other, metric, topk) {
  if (entry.run !== other.run || entry.derived || other.derived) return undefined;
  const pairs = runOf(entry).differences;
  const straight = pairs[entry.method]?.[other.method]?.[metric]?.[topk];
  const turned = pairs[other.method]?.[entry.method]?.[metric]?.[topk];
  return straight ?? (turned && [-turned[1], -turned[0]]);
}

export function sequencesWords() {
  const counts = index.runs.map((run) => run.sequences).filter((count) => count > 1);
  return `${[...new Set(counts)].join(" or ")} sequences`;
}
