// Percentiles over queries, where the worst are, and what methods took of their best keys.
import { at, element } from "./document.js";
import { index } from "./results.js";
import { figureCell, tabulate } from "./tables.js";
import { shown } from "./words.js";
/** @import { BestKey, Picture, Tail } from "./results.js" */

const PERCENTILES = ["5th percentile", "Median", "95th percentile"];
const FIGURES = ["Keys", "Best taken", "Recall", "Attention fraction", "Error norm"];

/** A table for each run that has tails, and its worst queries; else the section stays hidden. */
export function tabulateTails() {
  const runs = index.runs.filter(({ tails }) => tails.length);
  at("tails").hidden = at("tails-link").hidden = !runs.length;
  at("tails-tables").replaceChildren(...runs.flatMap(({ name }, number) => [
    ...nameAbove(name),
    scrolled(element("table", "", { id: tailsOf(number) }), `Tails of ${name}`),
  ]));
  runs.forEach(({ tails }, number) => {
    const columns = [
      { title: "Method", words: true },
      ...["Budget k", "Metric", ...PERCENTILES, "Worst", "Layer", "Head", "Sequence", "Position"]
        .map((title) => ({ title })),
      { title: "Shown by", words: true },
    ];
    tabulate(tailsOf(number), columns, tails.map((tail) => ({ cells: tailCells(tail) })));
  });
  at("worst").replaceChildren(...runs.flatMap(({ name, worst: { pictures, missing } }) => {
    if (!pictures.length && !missing) return [];
    const why = missing && `Worst queries that are not drawn here: ${missing} ` +
        "The commands in the table above show them where the trace is.";
    return [
      element("h3", `Worst queries${index.runs.length > 1 ? ` of ${name}` : ""}`),
      ...(missing ? [element("p", why, { class: "caption" })] : []),
      ...pictures.map(pictureOf),
    ];
  }));
}

/** @param {string} name of a run, where there are several */
const nameAbove = (name) => index.runs.length > 1 ? [element("h3", name)] : [];

/** @param {number} number of the runs that have tails */
const tailsOf = (number) => `tails-${number}`;

/** @param {HTMLTableElement} table @param {string} label */
const scrolled = (table, label) =>
  element("div", table, {
    class: "scroll tall",
    tabindex: "0",
    role: "region",
    "aria-label": label,
  });

/** @param {Tail} tail */
const tailCells = ({ method, topk, metric, percentiles, worst, at, command }) => [
  method,
  topk,
  metric,
  ...percentiles.map((figure) => figureCell(figure)),
  figureCell(worst),
  ...at,
  command || "retrace.analyze.show, in Python",
];

/** @param {Picture} picture */
function pictureOf({ why, place, tokens, methods, keys, more, figures }) {
  const headOf = (/** @type {string[]} */ titles) =>
    element("thead", element("tr", titles.map((title) => element("th", title, { scope: "col" }))));
  const best = element("table", [
    headOf(["Key", "Rank", "Position", "Attention", ...methods]),
    element("tbody", keys.map(keyRow)),
  ]);
  const taken = element("table", [
    headOf(["Method", ...FIGURES]),
    element(
      "tbody",
      methods.map((method, i) =>
        element("tr", [
          element("td", method),
          ...figures[i].map((figure, j) => element("td", j < 2 ? String(figure) : shown(figure))),
        ])
      ),
    ),
  ]);
  return element("article", [
    element("h4", why),
    element("p", `At ${place}. The tokens up to it:`, { class: "caption" }),
    element("p", [tokens.slice(0, -1).join(""), element("mark", tokens.at(-1))], {
      class: "tokens",
    }),
    scrolled(best, `Best keys at ${place}`),
    ...(more ? [element("p", `And ${more} more of the best.`, { class: "caption" })] : []),
    scrolled(taken, `What methods take at ${place}`),
  ], { class: "query" });
}

/** @param {BestKey} best */
const keyRow = ({ rank, key, token, around, probability, taken }) =>
  element("tr", [
    element("td", [
      element("mark", inOneLine(token)),
      ...(around ? [" in ", inOneLine(around)] : []),
    ], {
      class: "tokens",
    }),
    element("td", String(rank)),
    element("td", key.toLocaleString("en")),
    element("td", shown(probability)),
    ...taken.map((yes) => element("td", yes ? "taken" : "missed", { class: yes ? "" : "missed" })),
  ]);

/** @param {string} text */
const inOneLine = (text) => text.replaceAll("\n", "↵");
