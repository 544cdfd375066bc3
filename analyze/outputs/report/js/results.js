// What the page says of its results: runs, methods and metrics, and the places of their figures.
import { at } from "./document.js";

/**
 * @typedef {object} Metric
 * @property {string} title
 * @property {string} axis
 * @property {string} description
 * @property {number | null} most what it can come to
 * @property {1 | 0 | -1} better 1 where more is better, -1 where less is
 * @property {boolean} bucketed whether there are figures by position, and so a plot of curves
 */

/** @typedef {[number, number]} Ends of an interval */
/** @typedef {Record<string, Record<string, Record<string, Ends>>>} Intervals by method, metric and k */
/** @typedef {Record<string, Record<string, Record<string, number>>>} Places by method, metric and k */

/**
 * @typedef {object} Run
 * @property {string} name
 * @property {Record<string, any>} facts its run.json
 * @property {number[]} layers
 * @property {string[]} modules
 * @property {number} heads
 * @property {string} served
 * @property {number} sequences
 * @property {Intervals} intervals
 * @property {Record<string, Intervals>} differences of a method's means less another's
 * @property {{layer: Places, head: Places}} ends
 * @property {Patterns | null} patterns of its heads, where blocks of queries choose together
 * @property {{heads: number, axes: Record<string, Buckets>}} along
 * @property {{titles: string[], rows: string[][]}} locality a table in words
 * @property {Tail[]} tails
 * @property {{pictures: Picture[], missing: string}} worst its worst queries, and why some are missing
 */

/**
 * @typedef {object} Tail of a method, a budget and a metric
 * @property {string} method
 * @property {number} topk
 * @property {string} metric
 * @property {number[]} percentiles
 * @property {number} worst
 * @property {number[]} at layer, head, sequence and position of the worst query
 * @property {string} command that shows it; empty where there is none
 */

/**
 * @typedef {object} Picture of a query
 * @property {string} why it is one of the worst
 * @property {string} place
 * @property {string[]} tokens up to the query's own
 * @property {string[]} methods
 * @property {BestKey[]} keys the best, in order
 * @property {number} more of them are not drawn
 * @property {number[][]} figures of each method
 */

/**
 * @typedef {object} BestKey
 * @property {number} rank
 * @property {number} key
 * @property {string} token
 * @property {string} around
 * @property {number} probability
 * @property {boolean[]} taken by each method
 */

/** @typedef {{firsts: number[], queries: Record<string, number[]>}} Buckets */
/** @typedef {"mean" | "std" | "count"} Column */

/**
 * @typedef {object} Patterns
 * @property {number} share of the pairs of blocks that a pattern has
 * @property {number} enough of what the best blocks hold
 * @property {string[]} kinds
 * @property {string[]} colours of the kinds
 * @property {number} best place of the grid of each head's kind, by its number
 * @property {Record<string, number>} held places of the grids of mass, by pattern
 */

/**
 * @typedef {object} Entry a method of one of the runs
 * @property {number} run
 * @property {string} method
 * @property {string} label
 * @property {boolean} derived whether it is read off the other methods' rows
 * @property {{colour: string, dashes: string, marker: string}} style
 * @property {number[]} topk
 * @property {Record<string, (Record<Column, number> | null)[]>} figures
 * @property {number[]} curve_topk
 * @property {Record<string, (number | null)[]>} curves
 * @property {Record<string, Record<string, Record<string, number>>>} along by axis, metric and k
 */

/**
 * @typedef {object} Index
 * @property {string} version
 * @property {Record<string, Metric>} metrics
 * @property {"bytes_ratio" | "compute_ratio"} cost the metric of what methods take
 * @property {string} predicts
 * @property {Run[]} runs
 * @property {Entry[]} entries
 */

/** @type {Index} */
export const index = JSON.parse(at("index").textContent);

export const METRICS = index.metrics;
/** The metric of what methods take, and what it counts. */
export const COST = index.cost, COUNTED = COST === "compute_ratio" ? "pairs" : "bytes";
/** Metrics that have a plot of curves. */
export const CURVED = Object.keys(METRICS).filter((name) => METRICS[name].bucketed);

/** @param {Entry} entry */
export const runOf = (entry) => index.runs[entry.run];
