// Plots, which Plotly draws.
import { at, element } from "./document.js";
import { unpacked } from "./packed.js";
import { theme } from "./style.js";

/** @type {any} */
let Plotly;

/** Let the plotting library run, which the page's policy allows by its digest. */
export async function loadPlotly() {
  const library = new TextDecoder().decode(await unpacked("library"));
  document.head.append(element("script", library));
  Plotly = Object(globalThis).Plotly;
}

/** @returns {string} */
export const plotlyVersion = () => Plotly.version;

/** @param {string} id @param {any[]} traces @param {any} layout */
export function draw(id, traces, layout) {
  const ink = theme("ink"), line = theme("line"), touch = matchMedia("(pointer: coarse)").matches;
  const axis = {
    gridcolor: line,
    zerolinecolor: line,
    linecolor: line,
    automargin: true,
    fixedrange: touch,
  };
  Plotly.react(at(id), traces, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    margin: { l: 52, r: 12, t: 20, b: 44 },
    showlegend: false,
    hovermode: "closest",
    dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: theme("wash"), bordercolor: line, font: { color: ink }, align: "left" },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  }, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  });
}

/**
 * Other shapes over a plot, where it was drawn.
 * @param {string} id
 * @param {any[]} shapes
 */
export function reshape(id, shapes) {
  const plot = at(id);
  if ("layout" in plot && !plot.hidden) Plotly.relayout(plot, { shapes });
}

/**
 * Call back with the place of a cell that is chosen.
 * @param {string} id
 * @param {(place: {x: number, y: number}) => void} chosen
 */
export function onClick(id, chosen) {
  const plot = /** @type {any} */ (at(id));
  plot.on?.("plotly_click", (/** @type {any} */ event) => chosen(event.points[0]));
}

/**
 * What stands in a plot of nothing.
 * @param {any[]} traces
 */
export const nothing = (traces) =>
  traces.length ? [] : [{
    text: "not measured here",
    showarrow: false,
    xref: "paper",
    yref: "paper",
    x: 0.5,
    y: 0.5,
    font: { color: theme("faint") },
  }];
