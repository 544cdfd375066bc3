// Tables whose columns sort.
import { at, element } from "./document.js";
import { besideEnds, shown } from "./words.js";
/** @import { Ends } from "./results.js" */

/** @typedef {{title: string, words?: boolean}} TableColumn */
/** @typedef {{text: string, order: number, std?: number, ends?: Ends}} Figure sorted by its order */
/** @typedef {string | number | Figure} Cell */
/** @typedef {{cells: Cell[], marked?: boolean}} Row */

/** How the reader last sorted each table. @type {Record<string, {column: number | null, down: boolean}>} */
const orders = {};

/**
 * @param {string} id
 * @param {TableColumn[]} columns
 * @param {Row[]} rows
 */
export function tabulate(id, columns, rows) {
  const order = (orders[id] ??= { column: null, down: false }), body = element("tbody");
  const heads = columns.map((column, i) => {
    const button = element("button", column.title, { type: "button" });
    button.addEventListener("click", () => {
      order.down = order.column === i ? !order.down : !column.words;
      order.column = i;
      fill();
    });
    return element("th", button, { scope: "col", ...classOf(column) });
  });
  function fill() {
    heads.forEach((head, i) => {
      if (i !== order.column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    });
    body.replaceChildren(
      ...sorted(rows, order.column, order.down).map((row) => {
        const cells = row.cells.map((cell, i) => element("td", partsOf(cell), classOf(columns[i])));
        return element("tr", cells, { class: row.marked ? "chosen" : "" });
      }),
    );
  }
  fill();
  at(id).replaceChildren(element("thead", element("tr", heads)), body);
}

/** @param {number} value @param {boolean} signed */
export const figureCell = (value, signed = false) => ({
  text: shown(value, signed),
  order: value,
});

/**
 * @param {TableColumn} column
 * @returns {Record<string, string>}
 */
const classOf = ({ words }) => words ? { class: "words" } : {};

/** @param {Cell} cell */
function partsOf(cell) {
  if (typeof cell !== "object") return String(cell);
  const std = cell.std === undefined ? "" : `± ${shown(cell.std)}`;
  const beside = `${std}${besideEnds(cell.ends)}`.trim();
  return beside ? [cell.text, " ", element("span", beside, { class: "spread" })] : cell.text;
}

/** @param {Row[]} rows @param {number | null} column @param {boolean} down */
function sorted(rows, column, down) {
  if (column === null) return rows;
  const key = (/** @type {Row} */ { cells }) => {
    const cell = cells[column];
    return typeof cell === "object" ? cell.order : cell;
  };
  return rows.toSorted((a, b) => compared(key(a), key(b), down));
}

/**
 * Numbers by size and text as numbered things are; what has no figure is last either way.
 * @param {string | number} a
 * @param {string | number} b
 * @param {boolean} down
 */
function compared(a, b, down) {
  const lacks = [a, b].map((key) => typeof key === "number" && Number.isNaN(key));
  if (lacks[0] || lacks[1]) return Number(lacks[0]) - Number(lacks[1]);
  const difference = typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -difference : difference;
}
