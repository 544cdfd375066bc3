// Figures of the page: float32 grids (layers, heads), NaN where there is none.
import { joined, unpacked } from "./packed.js";
import { runOf } from "./results.js";
import { mean } from "./statistics.js";
/** @import { Column, Entry } from "./results.js" */

/** @typedef {Float32Array | number[]} Grid row by row */

let figures = new Float32Array();

export async function readFigures() {
  figures = joined(await unpacked("figures"));
}

/** @param {number} place @param {number} count */
export const figuresAt = (place, count) => figures.subarray(place, place + count);

/** @param {Entry} entry @param {number} place */
export function gridAt(entry, place) {
  const run = runOf(entry);
  return figuresAt(place, run.layers.length * run.heads);
}

/**
 * The grid of a method's metric at a budget asked for, null where there is none.
 * @param {Entry} entry
 * @param {string} metric
 * @param {number} topk
 * @param {Column} column
 */
export function grid(entry, metric, topk, column = "mean") {
  const places = entry.figures[metric]?.[entry.topk.indexOf(topk)];
  return places ? gridAt(entry, places[column]) : null;
}

/**
 * One figure of a grid: NaN where its run has no such layer or head.
 * @param {Entry} entry
 * @param {Grid | null} values
 * @param {number} layer
 * @param {number} head
 */
export function cell(entry, values, layer, head) {
  const run = runOf(entry), row = run.layers.indexOf(layer);
  return !values || row < 0 || head >= run.heads ? NaN : values[row * run.heads + head];
}

/**
 * The figures of a grid in some layer and head, or all of them where null; none that are NaN.
 * @param {Entry} entry
 * @param {Grid | null} values
 * @param {number | null} layer
 * @param {number | null} head
 */
export function within(entry, values, layer = null, head = null, heads = runOf(entry).heads) {
  const run = runOf(entry), /** @type {number[]} */ found = [];
  if (!values) return found;
  for (let row = 0; row < run.layers.length; row++) {
    if (layer !== null && run.layers[row] !== layer) continue;
    for (let h = 0; h < heads; h++) {
      const value = values[row * heads + h];
      if ((head === null || h === head) && !Number.isNaN(value)) found.push(value);
    }
  }
  return found;
}

/**
 * A method's mean over layers and heads.
 * @param {Entry} entry
 * @param {string} metric
 * @param {number} topk
 */
export const overall = (entry, metric, topk) => mean(within(entry, grid(entry, metric, topk)));

/**
 * The grid of a method less another's, head by head: NaN where either has no figure.
 * @param {Entry} entry
 * @param {Entry} other
 * @param {string} metric
 * @param {number} topk
 * @returns {number[]}
 */
export function differencesOf(entry, other, metric, topk) {
  const { layers, heads } = runOf(entry), less = grid(other, metric, topk);
  const layerOf = (/** @type {number} */ place) => layers[Math.floor(place / heads)];
  return Array.from(
    grid(entry, metric, topk) ?? [],
    (value, place) => value - cell(other, less, layerOf(place), place % heads),
  );
}
