// Which methods have lines in plots, and those plots.
import { bothChosen, chosen } from "./chosen.js";
import { drawCosts } from "./costs.js";
import { drawCurves } from "./curves.js";
import { at, element, shape } from "./document.js";
import { drawLayers } from "./layers.js";
import { index } from "./results.js";
import { colourOf, DASHES, MARKERS } from "./style.js";
/** @import { Entry } from "./results.js" */

export function drawLines() {
  drawCurves();
  drawCosts();
  drawLayers();
}

/** @param {Iterable<number>} entries that are drawn from now on */
export function drawOnly(entries) {
  chosen.drawn = new Set(entries);
  describeDrawn();
  drawLines();
}

export function describeDrawn() {
  countDrawn();
  at("legend-entries").replaceChildren(...index.entries.map((entry, i) => {
    const one = bothChosen().includes(i);
    const box = element("input", "", { type: "checkbox", value: i });
    box.checked = chosen.drawn.has(i);
    box.disabled = one;
    box.addEventListener("change", () => {
      chosen.drawn[box.checked ? "add" : "delete"](i);
      countDrawn();
      drawLines();
    });
    const label = element("span", breakable(entry.label), { title: entry.label });
    return element("label", [box, sampleOf(entry), label], { class: one ? "chosen" : "" });
  }));
}

function countDrawn() {
  at("legend-count").textContent = `Methods drawn: ${chosen.drawn.size} of ${index.entries.length}`;
}

/**
 * A piece of a method's line.
 * @param {Entry} entry
 */
function sampleOf(entry) {
  const { dashes, marker } = entry.style, colour = colourOf(entry);
  const line = shape("line", "", {
    x1: 0,
    x2: 34,
    y1: 7,
    y2: 7,
    stroke: colour,
    "stroke-width": 2,
    "stroke-dasharray": DASHES[dashes][1],
  });
  const point = shape("text", MARKERS[marker][1], {
    x: 17,
    y: 11.5,
    "text-anchor": "middle",
    "font-size": 12,
    fill: colour,
  });
  return shape("svg", [line, point], { width: 34, height: 14, "aria-hidden": "true" });
}

/**
 * Text that may be broken after its colons and commas.
 * @param {string} text
 */
const breakable = (text) =>
  text.split(/(?<=[,:/])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
