// What is chosen to be shown.
import { within } from "./figures.js";
import { endsWithin } from "./intervals.js";
import { sameQueries } from "./queries.js";
import { index } from "./results.js";
/** @import { Entry } from "./results.js" */
/** @import { Grid } from "./figures.js" */

const DRAWN_AT_FIRST = 10;

/**
 * @typedef {object} Chosen
 * @property {number} method of the entries, which
 * @property {number | null} other that it is compared with
 * @property {string} metric
 * @property {number} topk
 * @property {number | null} layer null for all
 * @property {number | null} head null for all
 * @property {string} against what curves are drawn over
 * @property {Set<number>} drawn entries that have lines
 */

export const chosen = atFirst();

/** @returns {Chosen} */
function atFirst() {
  const exact = index.entries.findIndex((entry) => entry.method === "exact");
  const others = index.entries.map((_, i) => i).filter((i) => i !== exact);
  const method = others[0] ?? exact, budgets = index.entries[method].topk;
  return {
    method,
    other: others.length ? exact : null,
    metric: "attention_fraction",
    topk: budgets[Math.floor(budgets.length / 2)],
    layer: null,
    head: null,
    against: "topk",
    drawn: new Set(index.entries.slice(0, DRAWN_AT_FIRST).keys()),
  };
}

export const methodChosen = () => index.entries[chosen.method];
export const otherChosen = () => chosen.other === null ? null : index.entries[chosen.other];

/** The entries chosen, as numbers: the one compared with first. */
export const bothChosen = () =>
  chosen.other === null ? [chosen.method] : [chosen.other, chosen.method];

/** @param {Entry} entry */
export const isChosen = (entry) => bothChosen().includes(index.entries.indexOf(entry));

/** Whether the chosen methods answered the same queries. */
export const alikeChosen = () =>
  sameQueries(bothChosen().map((i) => ({ entry: index.entries[i], topk: chosen.topk })));

/** Methods drawn, the chosen ones last and so on top. */
export function methodsDrawn() {
  const last = bothChosen(), before = [...chosen.drawn].filter((i) => !last.includes(i));
  return [...before.sort((a, b) => a - b), ...last].map((i) => index.entries[i]);
}

/**
 * The figures of a grid in the chosen layer and head.
 * @param {Entry} entry
 * @param {Grid | null} values
 */
export const inScope = (entry, values) => within(entry, values, chosen.layer, chosen.head);

/**
 * The interval of their mean.
 * @param {Entry} entry
 * @param {string} metric
 * @param {number} topk
 */
export const endsInScope = (entry, metric, topk) =>
  endsWithin(entry, metric, topk, chosen.layer, chosen.head);

export function scopeWords() {
  const layer = chosen.layer === null ? "all layers" : `layer ${chosen.layer}`;
  return chosen.head === null ? `${layer}, mean over heads` : `${layer}, head ${chosen.head}`;
}
