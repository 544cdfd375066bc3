// Colours, dashes and markers, as a light or a dark page has them.
/** @import { Entry } from "./results.js" */

export const dark = matchMedia("(prefers-color-scheme: dark)");
/** As plots and as the legend name them. @type {Record<string, [string, string]>} */
export const DASHES = {
  "-": ["solid", ""],
  "--": ["dash", "7 4"],
  ":": ["dot", "2 3"],
  "-.": ["dashdot", "7 3 2 3"],
};
/** Likewise. @type {Record<string, [string, string]>} */
export const MARKERS = {
  o: ["circle", "●"],
  s: ["square", "■"],
  "^": ["triangle-up", "▲"],
  D: ["diamond", "◆"],
  v: ["triangle-down", "▼"],
  P: ["cross", "✚"],
};
/** Okabe and Ito's colours, lighter where the page is dark. @type {Record<string, string>} */
const ON_DARK = {
  "#0072B2": "#4DA6E0",
  "#D55E00": "#F0803C",
  "#009E73": "#2CC29A",
  "#CC79A7": "#DF9CC1",
  black: "#F2F2F2",
};

/** @param {string} name */
export const theme = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** @param {Entry} entry */
export function colourOf(entry) {
  const { colour } = entry.style;
  return (dark.matches && ON_DARK[colour]) || colour;
}

/** @param {Entry} entry @param {number} opacity */
export function translucent(entry, opacity) {
  const colour = colourOf(entry), hex = colour === "black" ? "#000000" : colour;
  const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${parts},${opacity})`;
}
