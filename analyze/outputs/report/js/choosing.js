// How a reader chooses what is shown.
import { bothChosen, chosen, methodChosen, otherChosen } from "./chosen.js";
import { drawCosts } from "./costs.js";
import { drawCurves } from "./curves.js";
import { at, element, selectAt } from "./document.js";
import { tabulateLayers } from "./layers.js";
import { describeDrawn, drawLines, drawOnly } from "./legend.js";
import { drawMaps, markHead, onCell } from "./maps.js";
import { drawPatterns } from "./patterns.js";
import { tabulateComparison, tabulateMethods } from "./methods.js";
import { COST, COUNTED, index, METRICS, runOf } from "./results.js";
import { extent } from "./statistics.js";
import { dark } from "./style.js";

/** How long keys rest before curves follow, in milliseconds. */
const REST = 120;

/** Fill the boxes that are chosen from. */
export function offer() {
  /** @type {[number, string][]} */
  const names = index.entries.map((entry, i) => [i, entry.label]);
  const ascending = (/** @type {number[]} */ values) => [...new Set(values)].sort((a, b) => a - b);
  const numbered = (/** @type {number[]} */ values) =>
    values.map((value) => /** @type {[number, string]} */ ([value, String(value)]));
  const budgets = ascending(index.entries.flatMap((entry) => entry.topk));
  const layers = ascending(index.runs.flatMap((run) => run.layers));
  const [, heads] = extent(index.runs.map((run) => run.heads));
  options("method", names, chosen.method);
  options("other", [["", "none"], ...names], chosen.other);
  options(
    "metric",
    Object.entries(METRICS).map(([name, { title }]) => [name, title]),
    chosen.metric,
  );
  options("topk", numbered(budgets), chosen.topk);
  options("layer", [["", "all"], ...numbered(layers)], chosen.layer);
  Object.assign(at("against-cost"), { value: COST, textContent: COUNTED });
  options("head", [["", "all"], ...numbered([...Array(heads).keys()])], chosen.head);
}

/**
 * @param {string} id
 * @param {[string | number, string][]} pairs values and their words
 * @param {string | number | null} value
 */
function options(id, pairs, value) {
  selectAt(id).replaceChildren(
    ...pairs.map(([key, text]) => element("option", text, { value: key })),
  );
  selectAt(id).value = String(value ?? "");
}

export function show() {
  selectAt("method").title = methodChosen().label; // a box cuts it off
  selectAt("other").title = otherChosen()?.label ?? "";
  for (const i of bothChosen()) chosen.drawn.add(i);
  tabulateMethods();
  tabulateComparison();
  describeDrawn();
  drawMaps();
  drawPatterns();
  drawLines();
  tabulateLayers();
}

export function listen() {
  onChange("method", (value) => chosen.method = Number(value));
  onChange("other", (value) => chosen.other = numberOf(value));
  onChange("metric", (value) => chosen.metric = value);
  onChange("topk", (value) => chosen.topk = Number(value));
  selectAt("against").addEventListener("change", () => {
    chosen.against = selectAt("against").value;
    drawCurves();
  });
  for (const id of ["layer", "head"]) {
    selectAt(id).addEventListener("change", () => {
      showHead(numberOf(selectAt("layer").value), numberOf(selectAt("head").value));
    });
  }
  at("show-all").addEventListener("click", () => drawOnly(index.entries.keys()));
  at("show-none").addEventListener("click", () => drawOnly(bothChosen()));
  onCell((layer, head) => {
    showHead(layer, head);
    goToCurves();
  });
  at("maps").addEventListener("keydown", keyed());
  dark.addEventListener("change", show);
}

/** @param {string} text */
const numberOf = (text) => (text === "" ? null : Number(text));

/** @param {string} id @param {(value: string) => void} take */
function onChange(id, take) {
  selectAt(id).addEventListener("change", () => {
    take(selectAt(id).value);
    show();
  });
}

/** @param {number | null} layer @param {number | null} head */
function chooseHead(layer, head) {
  Object.assign(chosen, { layer, head });
  selectAt("layer").value = String(layer ?? "");
  selectAt("head").value = String(head ?? "");
  markHead();
}

/** @param {number | null} layer @param {number | null} head */
function showHead(layer, head) {
  chooseHead(layer, head);
  drawCurves();
  drawCosts();
  tabulateLayers();
}

function goToCurves() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  at("curves-title").focus({ preventScroll: true });
  at("curves").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

/** @type {Record<string, [number, number]>} */
const STEPS = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};

/** What keys do over the maps: arrows choose a head, whose curves follow when they rest. */
function keyed() {
  /** @type {number | undefined} */
  let settled;
  return (/** @type {KeyboardEvent} */ event) => {
    const { layers, heads } = runOf(methodChosen()), { layer, head } = chosen;
    const row = layer === null ? -1 : layers.indexOf(layer), step = STEPS[event.key];
    if (event.key === "Enter" && row >= 0 && head !== null) goToCurves();
    else if (step) {
      if (row < 0 || head === null) chooseHead(layers[Math.max(row, 0)], head ?? 0);
      else {
        const [down, right] = step;
        chooseHead(layers[inside(row + down, layers.length)], inside(head + right, heads));
      }
      clearTimeout(settled);
      settled = setTimeout(() => showHead(chosen.layer, chosen.head), REST);
    } else return;
    event.preventDefault();
  };
}

/** @param {number} place @param {number} count */
const inside = (place, count) => Math.min(Math.max(place, 0), count - 1);
