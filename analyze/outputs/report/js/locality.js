// How keys move from query to query, where a run followed them.
import { at, element } from "./document.js";
import { index } from "./results.js";
import { tabulate } from "./tables.js";

/** A table for each run that has one; else the section stays hidden. */
export function tabulateLocality() {
  const followed = index.runs.filter(({ locality }) => locality.rows.length);
  at("locality").hidden = at("locality-link").hidden = !followed.length;
  at("localities").replaceChildren(...followed.flatMap(({ name }, number) => [
    ...(index.runs.length > 1 ? [element("h3", name)] : []),
    element("div", element("table", "", { id: localityOf(number) }), {
      class: "scroll",
      tabindex: "0",
      role: "region",
      "aria-label": `Keys from query to query of ${name}`,
    }),
  ]));
  followed.forEach(({ locality: { titles, rows } }, number) => {
    const columns = titles.map((title, i) => ({ title, words: i === 0 }));
    const cells = rows.map(([method, ...figures]) => ({
      cells: [method, ...figures.map((text) => ({ text, order: amount(text) }))],
    }));
    tabulate(localityOf(number), columns, cells);
  });
}

/** @param {number} number of the runs that were followed */
const localityOf = (number) => `locality-${number}`;

/** The first number of a text; NaN where it has none. @param {string} text */
const amount = (text) => Number(text.replaceAll(",", "").match(/\d+(\.\d+)?/)?.[0] ?? NaN);
