// Axes and their ticks.
import { extent } from "./statistics.js";
/** @import { Metric } from "./results.js" */

/**
 * Ticks at 16 names at the most.
 * @param {number[]} names
 */
export function every(names) {
  const step = Math.ceil(names.length / 16);
  const places = names.map((_, i) => i).filter((i) => i % step === 0);
  return { tickvals: places, ticktext: places.map((i) => String(names[i])) };
}

/**
 * The axis of a metric.
 * @param {Metric} metric
 */
export const axisOf = ({ axis, most }) => ({
  title: { text: axis },
  ...(most ? { range: [-0.02, 1.03] } : { rangemode: "tozero" }),
});

/**
 * A logarithmic axis with ticks at 1, 2 and 5, or at the budgets where they are few.
 * @param {{x: number[]}[]} traces
 * @param {boolean} budgets
 */
export function logarithmic(traces, budgets = false) {
  const values = traces.flatMap((trace) => trace.x).filter((x) => x > 0), few = new Set(values);
  if (!values.length) return { type: "log" };
  const [least, most] = extent(values), decades = Math.log10(most / least);
  const factors = decades > 2.5 ? [1] : [1, 2, 5], /** @type {number[]} */ ticks = [];
  for (let e = Math.floor(Math.log10(least)); e <= Math.ceil(Math.log10(most)); e++) {
    ticks.push(...factors.map((factor) => Number(`${factor}e${e}`)));
  }
  const tickvals = budgets && few.size <= 5 ? [...few] : ticks;
  const margin = decades ? 0.04 * decades : 0.3;
  return {
    type: "log",
    tickvals,
    ticktext: tickvals.map(String),
    range: [Math.log10(least) - margin, Math.log10(most) + margin],
  };
}

/**
 * A logarithmic axis of buckets that double, a tick where some of them begin; 0 is left of 1.
 * @param {{x: number[]}[]} traces
 */
export function doubling(traces) {
  const values = traces.flatMap((trace) => trace.x);
  if (!values.length) return { type: "log" };
  const ends = extent(values);
  const least = Math.floor(Math.log2(ends[0])), most = Math.ceil(Math.log2(ends[1]));
  const step = Math.ceil((most - least + 1) / 7);
  const powers = Array.from({ length: most - least + 1 }, (_, i) => least + i)
    .filter((power) => (most - power) % step === 0);
  const [low, high] = [least, most].map((power) => power * Math.log10(2));
  const margin = 0.04 * (high - low) + 0.05;
  return {
    type: "log",
    tickvals: powers.map((power) => 2 ** power),
    ticktext: powers.map((power) => String(Math.floor(2 ** power))),
    range: [low - margin, high + margin],
  };
}
