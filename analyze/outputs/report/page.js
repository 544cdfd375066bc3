"use strict";
// Everything shown is computed from the grids of the page: float32 (layers, heads) for each method,
// metric and budget. What comes from results enters the document as text, never as HTML.

const at = (id) => document.getElementById(id);

const LOST = { title: "Lost attention mass", axis: "1 − attention fraction", better: -1 };
// What curves are drawn over; `begin` adds the metrics among it.
const AGAINST = {
  topk: { title: "budget k (keys per query and head)", words: "the budget" },
  position: { title: "position of the query", words: "the query's position" },
  distance: { title: "distance from the index's prefix", words: "the query's distance from the prefix that a state may be built from" },
};
const along = (against) => against === "position" || against === "distance";
const DASHES = { "-": ["solid", ""], "--": ["dash", "7 4"], ":": ["dot", "2 3"], "-.": ["dashdot", "7 3 2 3"] };
const MARKERS = { o: ["circle", "●"], s: ["square", "■"], "^": ["triangle-up", "▲"], D: ["diamond", "◆"], v: ["triangle-down", "▼"], P: ["cross", "✚"] };
// Okabe and Ito's colours, lighter where the page is dark.
const ON_DARK = { "#0072B2": "#4DA6E0", "#D55E00": "#F0803C", "#009E73": "#2CC29A", "#CC79A7": "#DF9CC1", black: "#F2F2F2" };
const DIVERGING = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"].map((c, i) => [i / 6, c]);
const DRAWN_AT_FIRST = 10;

let index, figures, METRICS, CURVED; // of the metrics, those that have a plot of curves
const chosen = { method: 0, other: null, metric: "attention_fraction", topk: 0, layer: null, head: null, against: "topk", drawn: new Set() };
const dark = matchMedia("(prefers-color-scheme: dark)");

// --- reading ----------------------------------------------------------------------------------

async function unpacked(id) {
  const text = atob(at(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function joined(planes) {
  const count = planes.length / 4, bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0; i < count; i++) bytes[4 * i + plane] = planes[plane * count + i];
  return new Float32Array(bytes.buffer);
}

const runOf = (entry) => index.runs[entry.run];

/** The grid of a method's metric at a budget asked for, null where there is none. */
function grid(entry, metric, topk, column = "mean") {
  const place = entry.figures[metric]?.[entry.topk.indexOf(topk)];
  return place ? slice(entry, place[column]) : null;
}

function slice(entry, place) {
  const run = runOf(entry);
  return figures.subarray(place, place + run.layers.length * run.heads);
}

/** One figure of a grid: NaN where its run has no such layer or head. */
function cell(entry, values, layer, head) {
  const run = runOf(entry), row = run.layers.indexOf(layer);
  return !values || row < 0 || head >= run.heads ? NaN : values[row * run.heads + head];
}

/** The figures of a grid in some layer and head, or all of them where null; none that are NaN. */
function within(entry, values, layer = chosen.layer, head = chosen.head, heads = runOf(entry).heads) {
  const run = runOf(entry), found = [];
  if (!values) return found;
  for (let row = 0; row < run.layers.length; row++) {
    if (layer !== null && run.layers[row] !== layer) continue;
    for (let h = 0; h < heads; h++) {
      const value = values[row * heads + h];
      if ((head === null || h === head) && !Number.isNaN(value)) found.push(value);
    }
  }
  return found;
}

const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
const spread = (values) => Math.sqrt(mean(values.map((v) => (v - mean(values)) ** 2)));
function quantile(values, share) {
  const sorted = Float64Array.from(values).sort(), place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.ceil(place)] - sorted[low]);
}
/** Where a scale of colours ends, so that a few heads far off do not take it all. */
const end = (values) => quantile(values, 0.98) || 0;
const overall = (entry, metric, topk) => mean(within(entry, grid(entry, metric, topk), null, null));

/** The interval over sequences of a method's mean over layers and heads; undefined where unknown. */
const interval = (entry, metric, topk) => entry.derived ? undefined : runOf(entry).intervals[entry.method]?.[metric]?.[topk];
/** That of a layer's mean over heads, or of a head; of all layers where that is null. */
function endsWithin(entry, metric, topk, layer = chosen.layer, head = chosen.head) {
  if (layer === null) return head === null ? interval(entry, metric, topk) : undefined;
  const run = runOf(entry), start = run.ends[head === null ? "layer" : "head"][entry.method]?.[metric]?.[topk], row = run.layers.indexOf(layer);
  if (entry.derived || start === undefined || row < 0 || head >= run.heads) return undefined;
  const [size, place] = head === null ? [run.layers.length, row] : [run.layers.length * run.heads, row * run.heads + head];
  const ends = [figures[start + place], figures[start + size + place]];
  return ends.some(Number.isNaN) ? undefined : ends;
}
/** That of a method's mean less another's: both must have answered the same sequences of one run. */
function intervalOfDifference(entry, other, metric, topk) {
  if (entry.run !== other.run || entry.derived || other.derived) return undefined;
  const pairs = runOf(entry).differences, straight = pairs[entry.method]?.[other.method]?.[metric]?.[topk];
  const turned = pairs[other.method]?.[entry.method]?.[metric]?.[topk];
  return straight ?? (turned && [-turned[1], -turned[0]]);
}

// --- words ------------------------------------------------------------------------------------

function shown(value, signed = false) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1e5 ? size.toExponential(3) : size >= 10 ? size.toPrecision(5) : size.toFixed(4);
  return (value < 0 && Number(text) ? "−" : signed && Number(text) ? "+" : "") + text;
}
const besideEnds = (ends) => ends ? ` ${shownEnds(ends)}` : "";
const shownEnds = (ends, signed = false) => ends ? `[${shown(ends[0], signed)}, ${shown(ends[1], signed)}]` : "–";
const counted = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const countedQueries = (count) => counted(count, "query").replace("querys", "queries");
/** Text that Plotly, which reads some HTML, shows as it is; long specs in lines. */
function plain(text, width = 44) {
  const lines = [""];
  for (const part of text.split(/(?<=[,:/ ])/)) {
    if (lines.at(-1) && (lines.at(-1) + part).length > width) lines.push("");
    lines[lines.length - 1] += part;
  }
  const escaped = (line) => line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return lines.map(escaped).join("<br>");
}
/** Text that may be broken after its colons and commas. */
const breakable = (text) => text.split(/(?<=[,:/])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
function scopeWords() {
  const layer = chosen.layer === null ? "all layers" : `layer ${chosen.layer}`;
  return chosen.head === null ? `${layer}, mean over heads` : `${layer}, head ${chosen.head}`;
}
function moduleOf(entry, layer) {
  const run = runOf(entry);
  return run.modules[run.layers.indexOf(layer)] ?? "";
}
const countedFrom = ({ min_context }) => (min_context == null ? "position 10 k" : `position ${min_context}`);

/** The least and the most queries of any head of a method at a budget: none where it was not measured. */
function queriesOf(entry, topk) {
  const counts = within(entry, grid(entry, "attention_fraction", topk, "count"), null, null);
  return counts.length ? [counts.reduce((a, b) => Math.min(a, b)), counts.reduce((a, b) => Math.max(a, b))] : [];
}
const shownQueries = (counts) => [...new Set(counts)].map((count) => count.toLocaleString("en")).join(" to ") || "–";
const ASKED = ["trace", "protocol", "min_context", "layers", "calibration"]; // facts that say which queries there are
/** What differs between results, in words. */
const unlikeWords = (runs) => ASKED.filter((name) => new Set(runs.map((run) => JSON.stringify(run.facts[name] ?? null))).size > 1)
  .join(", ").replace("min_context", "least position");
/** Whether methods answered the same queries, each at some budgets: [entry, budget]. */
const sameQueries = (some) => !unlikeWords(some.map(([entry]) => runOf(entry)))
  && new Set(some.map(([entry, topk]) => String(queriesOf(entry, topk)))).size < 2;
const OTHERS = "did not answer the same queries";

function element(tag, content = "", attributes = {}) {
  const made = document.createElement(tag);
  for (const part of [content].flat()) made.append(part);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// --- drawing ----------------------------------------------------------------------------------

const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
function colourOf(entry) {
  const { colour } = entry.style;
  return (dark.matches && ON_DARK[colour]) || colour;
}

function draw(id, traces, layout) {
  const ink = theme("ink"), line = theme("line"), touch = matchMedia("(pointer: coarse)").matches;
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: touch };
  Plotly.react(at(id), traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    margin: { l: 52, r: 12, t: 20, b: 44 }, showlegend: false, hovermode: "closest",
    dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: theme("wash"), bordercolor: line, font: { color: ink }, align: "left" },
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  });
}

function every(names) { // tick labels of at most 16 of them
  const step = Math.ceil(names.length / 16), places = names.map((_, i) => i).filter((i) => i % step === 0);
  return { tickvals: places, ticktext: places.map((i) => String(names[i])) };
}

/** A heat map; `values` by row of the run and head. */
function drawMap(id, entry, values, words, scale, ends = () => undefined) {
  const run = runOf(entry), rows = run.layers.map((_, row) => values.slice(row * run.heads, (row + 1) * run.heads));
  const text = rows.map((row, r) => Array.from(row, (value, h) => `layer ${run.layers[r]}, head ${h}<br>${words} ${Number.isNaN(value) ? "no query counts" : shown(value, scale.signed)}${besideEnds(ends(run.layers[r], h))}`));
  at(id).style.height = `${Math.min(Math.max(run.layers.length * 11, 130), 900) + 80}px`;
  draw(id, [{
    type: "heatmap", z: rows, text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false,
    xgap: run.heads <= 32 ? 1 : 0, ygap: run.layers.length <= 40 ? 1 : 0,
    colorscale: scale.colours, zmin: scale.least, zmax: scale.most,
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 }, title: { text: scale.title, side: "right", font: { size: 11 } } },
  }], {
    plot_bgcolor: theme("empty"), shapes: mark(entry),
    xaxis: { title: { text: "head" }, ...every([...Array(run.heads).keys()]), showgrid: false, zeroline: false, range: [-0.5, run.heads - 0.5] },
    yaxis: { title: { text: "layer" }, ...every(run.layers), showgrid: false, zeroline: false, range: [run.layers.length - 0.5, -0.5] },
  });
}

function mark(entry) {
  const row = runOf(entry).layers.indexOf(chosen.layer), column = chosen.head;
  if (row < 0 && column === null) return [];
  const [x0, x1] = column === null ? [-0.5, runOf(entry).heads - 0.5] : [column - 0.5, column + 0.5];
  const [y0, y1] = row < 0 ? [-0.5, runOf(entry).layers.length - 0.5] : [row - 0.5, row + 0.5];
  const box = { type: "rect", x0, x1, y0, y1 };
  return [{ ...box, line: { color: "#000000", width: 4 } }, { ...box, line: { color: "#ffffff", width: 2 } }];
}

function drawMaps() {
  const { metric, topk } = chosen, info = METRICS[metric];
  const [method, other] = [index.entries[chosen.method], index.entries[chosen.other]];
  const first = grid(method, metric, topk), second = other && grid(other, metric, topk);
  const both = [first, second].flatMap((values) => (values ? [...values].filter(Number.isFinite) : []));
  const scale = { colours: "Viridis", least: 0, most: info.most ?? (end(both) || 1), title: info.axis };
  at("heads-caption").textContent = `${info.title} (${info.description}) at k = ${topk}, mean over the queries that count. Choose a cell for that head's curves; with the keyboard, arrows move and Enter goes there.`
    + (info.most ? "" : " Colours end where 2 % of the heads lie beyond.")
    + (alikeChosen() ? "" : ` The two methods ${OTHERS}: their difference is not the methods' alone.`);
  showMap("method", method, first, scale, method.label);
  showMap("other", other, second, scale, other?.label);
  let difference = null;
  if (first && second) {
    const run = runOf(method);
    difference = first.map((value, i) => value - cell(other, second, run.layers[Math.floor(i / run.heads)], i % run.heads));
  }
  const sizes = [...(difference ?? [])].filter(Number.isFinite).map(Math.abs);
  const most = Math.max(0.01, info.most ? quantile(sizes, 1) || 0 : end(sizes));
  showMap("difference", method, difference, { colours: DIVERGING, least: -most, most, title: "difference", signed: true }, other && `Difference: ${method.label} less ${other.label}`);
  sayHead();
}

function showMap(part, entry, values, scale, title) {
  const id = `map-${part}`;
  at(id).parentElement.hidden = !entry || (part === "difference" && !values);
  if (!entry) return;
  at(`${id}-title`).textContent = values ? title : `${title}: not measured at k = ${chosen.topk}`;
  at(id).hidden = !values;
  if (values) drawMap(id, entry, values, part === "difference" ? "difference" : METRICS[chosen.metric].title.toLowerCase(), scale,
    part === "difference" ? undefined : (layer, head) => endsWithin(entry, chosen.metric, chosen.topk, layer, head));
}

const alikeChosen = () => sameQueries([chosen.method, chosen.other].filter((i) => i !== null).map((i) => [index.entries[i], chosen.topk]));

function sayHead(layer = chosen.layer, head = chosen.head) {
  const method = index.entries[chosen.method], other = index.entries[chosen.other], { metric, topk } = chosen;
  if (layer === null || head === null) return (at("readout").textContent = "No head is chosen.");
  const say = (entry) => {
    const value = cell(entry, grid(entry, metric, topk), layer, head);
    if (Number.isNaN(value)) return `${entry.label} –`;
    return `${entry.label} ${shown(value)}${besideEnds(endsWithin(entry, metric, topk, layer, head))} (std ${shown(cell(entry, grid(entry, metric, topk, "std"), layer, head))} over queries)`;
  };
  const queries = cell(method, grid(method, metric, topk, "count"), layer, head);
  at("readout").textContent = `Layer ${layer}, head ${head} (${moduleOf(method, layer)}), ${METRICS[metric].title.toLowerCase()} at k = ${topk}: `
    + [method, other].filter(Boolean).map(say).join("; ") + (queries > 0 ? `; ${countedQueries(queries)}.` : ".");
}

/** The points of a method's curve within the scope: at the budgets asked for, and between them. */
function curve(entry, metric, against, values = mean) {
  if (along(against)) return curveAlong(entry, metric, against, values);
  const points = new Map(), place = (topk) => (against === "topk" ? topk : mean(within(entry, grid(entry, against, topk))));
  if (against === "topk")
    (entry.curves[metric] ?? []).forEach((start, i) => start !== null && points.set(entry.curve_topk[i], { asked: false, values: within(entry, slice(entry, start)) }));
  for (const topk of entry.topk) points.set(topk, { asked: true, values: within(entry, grid(entry, metric, topk)), ends: endsWithin(entry, metric, topk) });
  return [...points].map(([topk, point]) => ({ topk, x: place(topk), y: values(point.values), ...point }))
    .filter(({ x, y, values: some }) => some.length && Number.isFinite(x) && Number.isFinite(y)).sort((a, b) => a.topk - b.topk);
}

/** The same at the chosen budget, bucket by bucket of the queries on an axis. */
function curveAlong(entry, metric, axis, values) {
  const run = runOf(entry), start = entry.along[axis]?.[metric]?.[chosen.topk];
  if (start === undefined) return [];
  const { heads, axes } = run.along, { firsts, queries } = axes[axis], size = run.layers.length * heads;
  return firsts.map((first, i) => {
    const grid = figures.subarray(start + i * size, start + (i + 1) * size), last = Math.max(first, 2 * first - 1);
    const some = within(entry, grid, chosen.layer, heads < run.heads ? null : chosen.head, heads);
    const numbers = `${axis} ${first === last ? first : `${first} to ${last}`}`;
    return { topk: chosen.topk, asked: true, values: some, x: Math.max(0.5, (first + last) / 2), y: values(some),
      at: `k = ${chosen.topk}, ${numbers} (${countedQueries(queries[chosen.topk][i])})` };
  }).filter(({ values: some }) => some.length);
}

function lineOf(entry, points, axes) {
  const role = index.entries.indexOf(entry), first = role === chosen.method, second = role === chosen.other;
  return {
    type: "scatter", mode: "lines+markers", name: plain(entry.label), x: points.map((p) => p.x), y: points.map((p) => p.y),
    line: { color: colourOf(entry), dash: DASHES[entry.style.dashes][0], width: first ? 3 : second ? 2.5 : 1.4 },
    marker: { color: colourOf(entry), symbol: MARKERS[entry.style.marker][0], opacity: 1, line: { width: 0 }, size: points.map((p) => (p.asked ? (first ? 8 : 6) : 0)) },
    text: points.map((p) => `${plain(entry.label)}<br>${p.at ?? `k = ${p.topk}`}<br>${axes} ${shown(p.y)}${besideEnds(p.ends)}${p.cost === undefined ? "" : `<br>bytes ${shown(p.cost)}`}`),
    hovertemplate: "%{text}<extra></extra>", opacity: first || second ? 1 : 0.8,
  };
}

/** Methods drawn, the chosen ones last and so on top. */
function drawn() {
  const last = [chosen.other, chosen.method].filter((i) => i !== null);
  return [...[...chosen.drawn].filter((i) => !last.includes(i)).sort((a, b) => a - b), ...last].map((i) => index.entries[i]);
}

function drawCurves() {
  const { against } = chosen;
  const method = index.entries[chosen.method], run = runOf(method), buckets = along(against);
  at("curves-title").textContent = `Curves: ${scopeWords()}${buckets ? `, k = ${chosen.topk}` : ""}`;
  const spreads = curve(method, "attention_fraction", against).some((point) => point.values.length > 1);
  const known = !buckets && CURVED.some((metric) => endsWithin(method, metric, chosen.topk));
  at("curves-caption").textContent = `Against ${AGAINST[against].words}; ${buckets ? alongWords(run, against) : `markers are the budgets asked for; where a method's choices nest, its line goes through the budgets between them. ${countedWords(run)}`}`
    + (spreads ? ` The ${known ? "pale band" : "band"} is 10 to 90 % of the ${buckets && run.along.heads < run.heads ? "layers' means" : "heads"} under ${method.label}.` : "")
    + (known ? ` ${intervalWords()}` : "");
  for (const metric of CURVED) {
    const traces = spreads ? band(method, metric, against) : [], lines = [];
    for (const entry of drawn()) {
      const points = curve(entry, metric, against);
      if (points.length) lines.push(lineOf(entry, points, METRICS[metric].title.toLowerCase()));
      if (isChosen(entry)) traces.push(...interval95(entry, points));
    }
    traces.push(...lines);
    draw(`curve-${metric}`, traces, {
      xaxis: { title: { text: AGAINST[against].title }, ...(buckets ? doubling(traces) : logarithmic(traces, against === "topk")) },
      yaxis: { title: { text: METRICS[metric].axis }, ...(METRICS[metric].most ? { range: [-0.02, 1.03] } : { rangemode: "tozero" }) },
      annotations: nothing(traces),
    });
  }
}

/** Which queries a run's figures are over. */
const countedWords = ({ facts }) => facts.min_context == null
  ? `Each k has queries of its own, from ${countedFrom(facts)} on, so a curve may fall.`
  : `All budgets have the same queries, from ${countedFrom(facts)} on.`;

/** What the buckets of an axis are, and what of them the page does not hold. */
function alongWords(run, axis) {
  const { axes, heads } = run.along, { protocol = "all" } = run.facts;
  if (!axes[axis]) return "these results hold no figures by it: an earlier version made them.";
  const from = protocol.startsWith("prefix") ? `A distance is counted from the prefix of the protocol ${protocol}.`
    : `Under the protocol ${protocol} a distance is counted from where fitted states were last built anew; methods that fit nothing do not depend on it.`;
  return "a marker is the mean of a bucket of queries, each twice as long as the one before."
    + (axis === "distance" ? ` ${from}` : "")
    + (heads < run.heads ? " Of so many figures the page holds means over heads only." : "");
}

function band(entry, metric, against) {
  const edge = (share) => curve(entry, metric, against, (values) => quantile(values, share));
  const [low, high] = [edge(0.1), edge(0.9)];
  if (!low.length) return [];
  const line = (points, rest) => ({ type: "scatter", mode: "lines", x: points.map((p) => p.x), y: points.map((p) => p.y), line: { width: 0 }, hoverinfo: "skip", ...rest });
  const { r, g, b } = components(colourOf(entry));
  return [line(low, {}), line(high, { fill: "tonexty", fillcolor: `rgba(${r},${g},${b},0.14)` })];
}

const isChosen = (entry) => [chosen.method, chosen.other].includes(index.entries.indexOf(entry));
const intervalWords = () => `The darker bands are 95 % intervals of ${chosen.other === null ? "its mean" : "both chosen methods' means"} over ${sequencesWords()}.`;

/** The band of the intervals that points have. */
function interval95(entry, points) {
  const some = points.filter((point) => point.ends), x = some.map((point) => point.x);
  if (some.length < 2) return [];
  const { r, g, b } = components(colourOf(entry));
  return [{
    type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", fill: "toself", fillcolor: `rgba(${r},${g},${b},0.3)`, meta: "interval",
    x: [...x, ...[...x].reverse()], y: [...some.map((p) => p.ends[0]), ...some.map((p) => p.ends[1]).reverse()],
  }];
}

function components(colour) {
  const hex = colour === "black" ? "#000000" : colour, part = (i) => parseInt(hex.slice(i, i + 2), 16);
  return { r: part(1), g: part(3), b: part(5) };
}

/** A logarithmic axis with ticks at 1, 2 and 5, or at the budgets where they are few. */
function logarithmic(traces, budgets = false) {
  const values = traces.flatMap((trace) => trace.x).filter((x) => x > 0);
  if (!values.length) return { type: "log" };
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const decades = Math.log10(most / least), factors = decades > 2.5 ? [1] : [1, 2, 5], ticks = [];
  for (let e = Math.floor(Math.log10(least)); e <= Math.ceil(Math.log10(most)); e++)
    for (const factor of factors) ticks.push(Number(`${factor}e${e}`));
  if (budgets && new Set(values).size <= 5) ticks.splice(0, ticks.length, ...new Set(values));
  const margin = decades ? 0.04 * decades : 0.3;
  return { type: "log", tickvals: ticks, ticktext: ticks.map(String), range: [Math.log10(least) - margin, Math.log10(most) + margin] };
}

/** A logarithmic axis of buckets that double, with a tick where some of them begin; 0 is left of 1. */
function doubling(traces) {
  const values = traces.flatMap((trace) => trace.x);
  if (!values.length) return { type: "log" };
  const least = Math.floor(Math.log2(values.reduce((a, b) => Math.min(a, b)))), most = Math.ceil(Math.log2(values.reduce((a, b) => Math.max(a, b))));
  const step = Math.ceil((most - least + 1) / 7), powers = [...Array(most - least + 1).keys()].map((i) => least + i).filter((power) => (most - power) % step === 0);
  const [low, high] = [least, most].map((power) => power * Math.log10(2)), margin = 0.04 * (high - low) + 0.05;
  return { type: "log", tickvals: powers.map((power) => 2 ** power), ticktext: powers.map((power) => String(Math.floor(2 ** power))), range: [low - margin, high + margin] };
}

const nothing = (traces) => traces.length ? [] : [{ text: "not measured here", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: theme("faint") } }];

function drawCosts() {
  at("cost-title").textContent = `Cost: ${scopeWords()}`;
  for (const [id, metric, info, of] of [
    ["cost-error_norm", "error_norm", METRICS.error_norm, (y) => y],
    ["cost-lost", "attention_fraction", LOST, (y) => 1 - y],
  ]) {
    const lines = drawn().filter((entry) => !entry.derived)
      .map((entry) => [entry, curve(entry, metric, "bytes_ratio").map((p) => ({ ...p, y: of(p.y), cost: p.x, ends: undefined }))])
      .filter(([, points]) => points.length);
    const front = [], points = lines.flatMap(([entry, some]) => some.map((point) => ({ ...point, entry })));
    const alike = sameQueries(points.map(({ entry, topk }) => [entry, topk]));
    for (const point of alike ? points.sort((a, b) => a.x - b.x || a.y - b.y) : [])
      if (!front.length || point.y < front.at(-1).y) front.push(point);
    at("cost-caption").textContent = "A point is a budget, a line a method. " + (alike
      ? "The broad grey line is the Pareto front: of the methods drawn, none does better with as few bytes."
      : `There is no Pareto front: the points ${OTHERS}, and a line may rise for that alone.`);
    const traces = lines.map(([entry, points]) => lineOf(entry, points, info.title.toLowerCase()));
    if (front.length) traces.unshift({
      type: "scatter", mode: "lines", name: "Pareto front", x: front.map((p) => p.x), y: front.map((p) => p.y),
      line: { color: theme("front"), width: 9, shape: "hv" }, hoverinfo: "skip",
    });
    draw(id, traces, {
      xaxis: { title: { text: AGAINST.bytes_ratio.title }, ...logarithmic(traces) },
      yaxis: { title: { text: info.axis }, rangemode: "tozero" }, annotations: nothing(traces),
    });
  }
}

function drawLayers() {
  const { metric, topk } = chosen, info = METRICS[metric], traces = [];
  const layers = index.runs.flatMap((run) => run.layers);
  at("layers-title").textContent = `${info.title} by layer at k = ${topk}`;
  for (const entry of drawn()) {
    const run = runOf(entry), values = grid(entry, metric, topk);
    if (!values) continue;
    const points = run.layers.map((layer) => ({ layer, heads: within(entry, values, layer, null) })).filter((p) => p.heads.length)
      .map(({ layer, heads }) => ({ topk, asked: run.layers.length <= 40, x: layer, y: mean(heads), std: spread(heads), ends: endsWithin(entry, metric, topk, layer, null) }));
    const line = lineOf(entry, points, info.title.toLowerCase());
    line.text = line.text.map((text, i) => `${text} (std ${shown(points[i].std)})<br>layer ${points[i].x}`);
    if (entry === index.entries[chosen.method]) {
      const { r, g, b } = components(colourOf(entry));
      const edge = (sign, rest) => ({ type: "scatter", mode: "lines", x: line.x, y: points.map((p) => Math.max(0, Math.min(info.most ?? Infinity, p.y + sign * p.std))), line: { width: 0 }, hoverinfo: "skip", ...rest });
      traces.push(edge(-1, {}), edge(1, { fill: "tonexty", fillcolor: `rgba(${r},${g},${b},0.14)` }));
    }
    if (isChosen(entry)) traces.push(...interval95(entry, points));
    traces.push(line);
  }
  const method = index.entries[chosen.method];
  at("layers-caption").textContent = `Mean over a layer's heads; the pale band is one standard deviation across the heads of ${method.label}.`
    + (runOf(method).layers.some((layer) => endsWithin(method, metric, topk, layer, null)) ? ` ${intervalWords()}` : "");
  draw("layers-plot", traces, {
    xaxis: { title: { text: "layer" }, tickformat: "d", range: [Math.min(...layers) - 0.5, Math.max(...layers) + 0.5], ...(layers.length > 16 ? { nticks: 16 } : { dtick: 1 }) },
    yaxis: { title: { text: info.axis }, ...(info.most ? { range: [-0.02, 1.03] } : { rangemode: "tozero" }) },
    annotations: nothing(traces),
  });
}

// --- tables -----------------------------------------------------------------------------------

const orders = {};

/** A table whose columns sort; a cell is a text, a number, or {text, order}. */
function tabulate(id, columns, rows, rowClass = () => "") {
  const order = (orders[id] ??= { column: null, down: false }), body = element("tbody");
  const heads = columns.map(({ title, words }, i) => {
    const button = element("button", title, { type: "button" });
    const head = element("th", button, { scope: "col", ...(words ? { class: "words" } : {}) });
    button.addEventListener("click", () => {
      order.down = order.column === i ? !order.down : !words;
      order.column = i;
      fill();
    });
    return head;
  });
  function fill() {
    const key = (row) => row.cells[order.column]?.order ?? row.cells[order.column];
    const sorted = order.column === null ? rows : [...rows].sort((a, b) => compared(key(a), key(b), order.down));
    heads.forEach((head, i) => {
      if (i === order.column) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(...sorted.map((row) => element("tr", row.cells.map((value, i) => {
      const beside = `${value?.std === undefined ? "" : `± ${shown(value.std)}`}${besideEnds(value?.ends)}`.trim();
      const spread = beside ? [" ", element("span", beside, { class: "spread" })] : [];
      return element("td", [value?.text ?? (typeof value === "number" ? String(value) : value), ...spread], columns[i].words ? { class: "words" } : {});
    }), { class: rowClass(row) })));
  }
  fill();
  at(id).replaceChildren(element("thead", element("tr", heads)), body);
}

function compared(a, b, down) {
  const missing = (value) => typeof value === "number" && Number.isNaN(value);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b) * (down ? -1 : 1);
}

const figure = (value, signed = false) => ({ text: shown(value, signed), order: value });

function sequencesWords() {
  const counts = [...new Set(index.runs.map((run) => run.sequences).filter((count) => count > 1))];
  return `${counts.join(" or ")} sequences`;
}

function queriesCell(entry, topk) {
  const counts = queriesOf(entry, topk);
  return { text: shownQueries(counts), order: counts[0] ?? NaN };
}

function tabulateMethods() {
  const { topk } = chosen, titles = Object.entries(METRICS);
  const some = index.runs.some((run) => Object.keys(run.intervals).length);
  at("overview-caption").textContent = `Means over layers and heads at k = ${topk}${some ? `, in brackets their 95 % intervals over ${sequencesWords()}, taken as drawn from all that there could be, their means as skewed as exponential ones at the most` : ", without intervals, which take more than one sequence"}. Bytes are those read over those of full attention, ${[...new Set(index.runs.map((run) => run.served))].join(" or ")}. Compare methods at equal bytes, not only at equal k. ${index.predicts}`;
  tabulate("methods-table", [{ title: "Method", words: true }, ...titles.map(([, info]) => info), { title: "Queries" }],
    index.entries.map((entry, number) => ({ number, cells: [entry.label, ...titles.map(([metric]) => ({ ...figure(overall(entry, metric, topk)), ends: interval(entry, metric, topk) })), queriesCell(entry, topk)] })),
    (row) => (row.number === chosen.method ? "chosen" : ""));
}

function tabulateComparison() {
  const method = index.entries[chosen.method], other = index.entries[chosen.other], { topk } = chosen;
  at("comparison").hidden = !other;
  if (!other) return;
  at("comparison-title").textContent = `${method.label} against ${other.label} at k = ${topk}`;
  at("comparison-caption").textContent = `Differences are head by head, ${method.label} less ${other.label}; bytes are those read over those of full attention.`
    + (alikeChosen() ? "" : ` They ${OTHERS}: the differences are not the methods' alone.`)
    + (method.run !== other.run ? " Methods of different results have no interval."
      : Object.keys(runOf(method).differences).length ? ` The interval is that of the mean difference over pairs of the same ${sequencesWords()}: where it leaves out zero, the difference is more than the choice of sequences explains.` : "");
  const rows = Object.entries(METRICS).map(([metric, info]) => {
    const [first, second] = [method, other].map((entry) => grid(entry, metric, topk)), run = runOf(method);
    const differences = [...(first ?? [])].map((v, i) => v - cell(other, second, run.layers[Math.floor(i / run.heads)], i % run.heads)).filter((v) => !Number.isNaN(v));
    const ends = intervalOfDifference(method, other, metric, topk);
    const better = differences.filter((v) => v * info.better > 0).length, some = differences.length > 0;
    return { cells: [
      info.title, figure(overall(method, metric, topk)), figure(overall(other, metric, topk)), figure(some ? mean(differences) : NaN, true),
      { text: shownEnds(ends, true), order: ends ? ends[0] : NaN },
      { text: some ? `${shown(quantile(differences, 0.1), true)} to ${shown(quantile(differences, 0.9), true)}` : "–", order: some ? quantile(differences, 0.9) - quantile(differences, 0.1) : NaN },
      { text: some && info.better ? `${better} of ${differences.length}` : "–", order: some && info.better ? better : NaN },
    ] };
  });
  tabulate("comparison-table", [{ title: "Metric", words: true }, { title: method.label }, { title: other.label }, { title: "Mean difference" }, { title: "95 % interval of it" }, { title: "10 to 90 % of heads" }, { title: `Heads where ${method.label} is better` }], rows);
}

function tabulateLayers() {
  const method = index.entries[chosen.method], other = index.entries[chosen.other], { metric, topk } = chosen, run = runOf(method);
  at("layers-table-title").textContent = `Layers under ${method.label} at k = ${topk}: mean ± standard deviation across heads${Object.keys(run.ends.layer).length ? " [95 % interval over sequences]" : ""}`;
  const metrics = Object.keys(METRICS).filter((name) => grid(method, name, topk));
  const columns = [{ title: "Layer" }, { title: "Module", words: true }, ...metrics.map((name) => METRICS[name])];
  if (other) columns.push({ title: `${METRICS[metric].title}, difference to ${other.label}` });
  tabulate("layers-table", columns, run.layers.map((layer, row) => {
    const of = (entry, name) => within(entry, grid(entry, name, topk), layer, null);
    const cells = metrics.map((name) => {
      const heads = of(method, name);
      return { ...figure(mean(heads)), ...(heads.length ? { std: spread(heads), ends: endsWithin(method, name, topk, layer, null) } : {}) };
    });
    if (other) cells.push(figure(mean(of(method, metric)) - mean(of(other, metric)), true));
    return { layer, cells: [layer, run.modules[row], ...cells] };
  }), (row) => (row.layer === chosen.layer ? "chosen" : ""));
}

// --- the run ----------------------------------------------------------------------------------

function words(value) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) return value.map(words).join(", ");
  return typeof value === "object" ? Object.entries(value).map(([name, part]) => `${name} ${words(part)}`).join(", ") : String(value);
}

function list(facts) {
  return element("dl", Object.entries(facts).flatMap(([name, value]) => [element("dt", name), element("dd", words(value))]));
}

function describeRuns() {
  at("runs").replaceChildren(...index.runs.map((run, number) => {
    const { methods = {}, history = [], ...facts } = run.facts, part = element("div", element("h3", run.name));
    part.append(list(facts));
    const id = `specs-${number}`;
    part.append(element("h3", "Methods, with all parameters"), element("div", element("table", "", { id }), { class: "scroll", tabindex: "0", role: "region", "aria-label": `Specs of ${run.name}` }));
    const { profile, ...newest } = history.at(-1) ?? {};
    if (history.length) part.append(element("h3", `Newest of ${counted(history.length, "run")}`), list({ ...newest, ...(profile ? { seconds: profile.wall } : {}) }));
    part.append(element("details", [element("summary", "run.json, whole"), element("pre", JSON.stringify(run.facts, null, 2), { tabindex: "0" })]));
    queueMicrotask(() => tabulate(id, ["Method", "Parameters", "Source"].map((title) => ({ title, words: true })).concat([{ title: "Building, s" }, { title: "Largest state, bytes" }]),
      Object.entries(methods).map(([spec, about]) => ({ cells: [
        spec, Object.entries(about.parameters ?? {}).map(([name, value]) => `${name}=${words(value)}`).join(", "), words(about.source),
        figure(about.state?.build_seconds ?? NaN), { text: about.state ? about.state.largest_bytes.toLocaleString("en") : "–", order: about.state?.largest_bytes ?? NaN },
      ] }))));
    return part;
  }));
}

function factsInWords({ facts, layers, heads }, entries) {
  const counts = entries.flatMap((entry) => entry.topk.flatMap((topk) => queriesOf(entry, topk)));
  const range = counts.length ? [counts.reduce((a, b) => Math.min(a, b)), counts.reduce((a, b) => Math.max(a, b))] : [];
  return [
    words(facts.model?.pretrained ?? ""), `${counted(layers.length, "layer")} × ${counted(heads, "head")}`,
    facts.sequences && counted(facts.sequences.length, "sequence"), facts.dtype, facts.protocol && `protocol ${facts.protocol}`,
    `${shownQueries(range)} queries of each head, from ${countedFrom(facts)} on`, counted(entries.length, "method"),
  ].filter(Boolean).join(" · ");
}

function describe() {
  at("subtitle").replaceChildren(...index.runs.map((run, i) => {
    const name = index.runs.length > 1 ? [element("strong", run.name), " "] : [];
    return element("span", [...name, factsInWords(run, index.entries.filter((entry) => entry.run === i && !entry.derived))]);
  }));
  const unlike = unlikeWords(index.runs);
  at("unlike").hidden = !unlike;
  at("unlike").textContent = `These results differ in ${unlike}: their methods ${OTHERS}, so differences between them are not the methods' alone.`;
  at("footer").textContent = `Made by retrace ${index.version}; drawn with plotly.js ${Plotly.version} (MIT licence).`;
}

// --- choosing ---------------------------------------------------------------------------------

function options(id, pairs, value) {
  at(id).replaceChildren(...pairs.map(([key, text]) => element("option", text, { value: key === null ? "" : key })));
  at(id).value = value === null ? "" : String(value);
}

function offer() {
  const names = index.entries.map((entry, i) => [i, entry.label]);
  const budgets = [...new Set(index.entries.flatMap((entry) => entry.topk))].sort((a, b) => a - b);
  const layers = [...new Set(index.runs.flatMap((run) => run.layers))].sort((a, b) => a - b);
  const heads = Math.max(...index.runs.map((run) => run.heads));
  options("method", names, chosen.method);
  options("other", [[null, "none"], ...names], chosen.other);
  options("metric", Object.keys(METRICS).map((name) => [name, METRICS[name].title]), chosen.metric);
  options("topk", budgets.map((k) => [k, k]), chosen.topk);
  options("layer", [[null, "all"], ...layers.map((layer) => [layer, layer])], chosen.layer);
  options("head", [[null, "all"], ...[...Array(heads).keys()].map((head) => [head, head])], chosen.head);
}

function describeDrawn() {
  at("legend-count").textContent = `Methods drawn: ${chosen.drawn.size} of ${index.entries.length}`;
  at("legend-entries").replaceChildren(...index.entries.map((entry, i) => {
    const box = element("input", "", { type: "checkbox", value: i });
    box.checked = chosen.drawn.has(i);
    box.disabled = i === chosen.method || i === chosen.other;
    box.addEventListener("change", () => {
      chosen.drawn[box.checked ? "add" : "delete"](i);
      at("legend-count").textContent = `Methods drawn: ${chosen.drawn.size} of ${index.entries.length}`;
      drawLines();
    });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, value] of Object.entries({ width: 34, height: 14, "aria-hidden": "true" })) svg.setAttribute(name, value);
    for (const [tag, attributes, text] of [
      ["line", { x1: 0, x2: 34, y1: 7, y2: 7, stroke: colourOf(entry), "stroke-width": 2, "stroke-dasharray": DASHES[entry.style.dashes][1] }, ""],
      ["text", { x: 17, y: 11.5, "text-anchor": "middle", "font-size": 12, fill: colourOf(entry) }, MARKERS[entry.style.marker][1]],
    ]) {
      const part = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
      part.textContent = text;
      svg.append(part);
    }
    return element("label", [box, svg, element("span", breakable(entry.label), { title: entry.label })], i === chosen.method || i === chosen.other ? { class: "chosen" } : {});
  }));
}

function drawLines() {
  drawCurves();
  drawCosts();
  drawLayers();
}

function show() {
  for (const id of ["method", "other"]) at(id).title = index.entries[chosen[id]]?.label ?? ""; // a box cuts it off
  for (const i of [chosen.method, chosen.other]) if (i !== null) chosen.drawn.add(i);
  tabulateMethods();
  tabulateComparison();
  describeDrawn();
  drawMaps();
  drawLines();
  tabulateLayers();
}

function chooseHead(layer, head) {
  Object.assign(chosen, { layer, head });
  at("layer").value = layer ?? "";
  at("head").value = head ?? "";
  for (const [part, i] of [["method", chosen.method], ["other", chosen.other], ["difference", chosen.method]])
    if (i !== null && at(`map-${part}`).layout && !at(`map-${part}`).hidden) Plotly.relayout(at(`map-${part}`), { shapes: mark(index.entries[i]) });
  sayHead();
}

function showHead(layer, head) {
  chooseHead(layer, head);
  drawCurves();
  drawCosts();
  tabulateLayers();
}

function goToCurves() {
  at("curves-title").focus({ preventScroll: true });
  at("curves").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

let settled;
function listen() {
  const number = (text) => (text === "" ? null : Number(text));
  for (const id of ["method", "other", "topk"]) at(id).addEventListener("change", () => { chosen[id] = number(at(id).value); show(); });
  at("metric").addEventListener("change", () => { chosen.metric = at("metric").value; show(); });
  at("against").addEventListener("change", () => { chosen.against = at("against").value; drawCurves(); });
  for (const id of ["layer", "head"]) at(id).addEventListener("change", () => showHead(number(at("layer").value), number(at("head").value)));
  at("show-all").addEventListener("click", () => { index.entries.forEach((_, i) => chosen.drawn.add(i)); describeDrawn(); drawLines(); });
  at("show-none").addEventListener("click", () => { chosen.drawn = new Set([chosen.other, chosen.method].filter((i) => i !== null)); describeDrawn(); drawLines(); });
  for (const part of ["method", "other", "difference"]) at(`map-${part}`).on?.("plotly_click", (event) => clicked(part, event));
  at("maps").addEventListener("keydown", (event) => {
    const run = runOf(index.entries[chosen.method]), row = run.layers.indexOf(chosen.layer), head = chosen.head;
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" && row >= 0 && head !== null) goToCurves();
    else if (step) {
      const to = (value, move, count) => Math.min(Math.max(value + move, 0), count - 1);
      if (row < 0 || head === null) chooseHead(run.layers[Math.max(row, 0)], head ?? 0);
      else chooseHead(run.layers[to(row, step[0], run.layers.length)], to(head, step[1], run.heads));
      clearTimeout(settled); // the curves follow when the keys rest
      settled = setTimeout(() => showHead(chosen.layer, chosen.head), 120);
    } else return;
    event.preventDefault();
  });
  dark.addEventListener("change", show);
}

function clicked(part, event) {
  const entry = index.entries[part === "other" ? chosen.other : chosen.method], { x, y } = event.points[0];
  showHead(runOf(entry).layers[y], x);
  goToCurves();
}

// --- beginning --------------------------------------------------------------------------------

async function begin() {
  index = JSON.parse(at("index").textContent);
  METRICS = index.metrics;
  CURVED = Object.keys(METRICS).filter((name) => METRICS[name].bucketed);
  for (const name of ["density", "bytes_ratio"]) AGAINST[name] = { title: METRICS[name].axis, words: METRICS[name].description };
  const library = document.createElement("script"); // allowed by its digest in the page's policy
  library.textContent = new TextDecoder().decode(await unpacked("library"));
  document.head.append(library);
  figures = joined(await unpacked("figures"));
  const exact = index.entries.findIndex((entry) => entry.method === "exact");
  const others = index.entries.map((_, i) => i).filter((i) => i !== exact);
  chosen.method = others[0] ?? exact;
  chosen.other = others.length ? exact : null;
  const budgets = index.entries[chosen.method].topk;
  chosen.topk = budgets[Math.floor(budgets.length / 2)];
  index.entries.slice(0, DRAWN_AT_FIRST).forEach((_, i) => chosen.drawn.add(i));
  offer();
  describe();
  describeRuns();
  document.querySelector("main").hidden = false;
  show();
  listen();
  at("status").hidden = true;
  document.body.dataset.ready = "";
}

begin().catch((error) => {
  at("status").textContent = `The figures cannot be read: ${error}. The page takes a browser of 2023 or newer.`;
  throw error;
});
