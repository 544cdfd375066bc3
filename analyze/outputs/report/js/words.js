// Figures and facts in words.
/** @import { Ends } from "./results.js" */

/** @param {number} value @param {boolean} signed whether a sign stands before more than zero */
export function shown(value, signed = false) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1e5
    ? size.toExponential(3)
    : size >= 10
    ? size.toPrecision(5)
    : size.toFixed(4);
  const zero = Number(text) === 0;
  return (zero ? "" : value < 0 ? "−" : signed ? "+" : "") + text;
}

/** @param {Ends | undefined} ends @param {boolean} signed */
export const shownEnds = (ends, signed = false) =>
  ends ? `[${shown(ends[0], signed)}, ${shown(ends[1], signed)}]` : "–";

/** @param {Ends | undefined} ends */
export const besideEnds = (ends) => ends ? ` ${shownEnds(ends)}` : "";

/** @param {number} count @param {string} word */
export const counted = (count, word) =>
  `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** @param {number} count */
export const countedQueries = (count) => counted(count, "query").replace("querys", "queries");

/**
 * A fact of a run, whatever it is.
 * @param {any} value
 * @returns {string}
 */
export function inWords(value) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) return value.map(inWords).join(", ");
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, part]) => `${name} ${inWords(part)}`).join(", ");
}
