// What runs were of, as their run.json tells.
import { at, element } from "./document.js";
import { plotlyVersion } from "./plot.js";
import { countedWords, OTHERS, queriesOf, shownQueries, unlikeWords } from "./queries.js";
import { index } from "./results.js";
import { extent } from "./statistics.js";
import { figureCell, tabulate } from "./tables.js";
import { counted, inWords } from "./words.js";
/** @import { Entry, Run } from "./results.js" */

/** The page's head and foot. */
export function describe() {
  const several = index.runs.length > 1;
  at("subtitle").replaceChildren(...index.runs.map((run, i) => {
    const entries = index.entries.filter((entry) => entry.run === i && !entry.derived);
    const name = several ? [element("strong", run.name), " "] : [];
    return element("span", [...name, factsInWords(run, entries)]);
  }));
  const unlike = unlikeWords(index.runs);
  at("unlike").hidden = !unlike;
  at("unlike").textContent = `These results differ in ${unlike}: their methods ${OTHERS}, so ` +
    "differences between them are not the methods' alone.";
  at("footer").textContent =
    `Made by retrace ${index.version}; drawn with plotly.js ${plotlyVersion()} (MIT licence).`;
}

/** @param {Run} run @param {Entry[]} entries */
function factsInWords(run, entries) {
  const { facts, layers, heads } = run;
  const counts = entries.flatMap((entry) => entry.topk.flatMap((topk) => queriesOf(entry, topk)));
  const queries = shownQueries(counts.length ? extent(counts) : []);
  return [
    inWords(facts.model?.pretrained ?? ""),
    `${counted(layers.length, "layer")} × ${counted(heads, "head")}`,
    facts.sequences && counted(facts.sequences.length, "sequence"),
    facts.dtype,
    facts.protocol && `protocol ${facts.protocol}`,
    `${queries} queries of each head, ${countedWords(run)}`,
    facts.evidence && facts.evidence !== "evidence" && `evidence: ${facts.evidence}`,
    counted(entries.length, "method"),
  ].filter(Boolean).join(" · ");
}

/** All facts of every run, its methods' among them. */
export function describeRuns() {
  at("runs").replaceChildren(...index.runs.map(partOf));
  index.runs.forEach(tabulateSpecs);
}

/** @param {Run} run @param {number} number */
function partOf({ name, facts }, number) {
  const { methods: _, history = [], ...rest } = facts, region = `Specs of ${name}`;
  const { profile, ...newest } = history.at(-1) ?? {};
  const last = { ...newest, ...(profile ? { seconds: profile.wall } : {}) };
  const whole = element("pre", JSON.stringify(facts, null, 2), { tabindex: "0" });
  return element("div", [
    element("h3", name),
    list(rest),
    element("h3", "Methods, with all parameters"),
    element("div", element("table", "", { id: specsOf(number) }), {
      class: "scroll",
      tabindex: "0",
      role: "region",
      "aria-label": region,
    }),
    ...(history.length
      ? [element("h3", `Newest of ${counted(history.length, "run")}`), list(last)]
      : []),
    element("details", [element("summary", "run.json, whole"), whole]),
  ]);
}

/** @param {number} number of a run */
const specsOf = (number) => `specs-${number}`;

/** @param {Record<string, any>} facts */
function list(facts) {
  const lines = Object.entries(facts)
    .flatMap(([name, value]) => [element("dt", name), element("dd", inWords(value))]);
  return element("dl", lines);
}

/** @param {Run} run @param {number} number */
function tabulateSpecs({ facts }, number) {
  const columns = [
    { title: "Method", words: true },
    { title: "Parameters", words: true },
    { title: "Source", words: true },
    { title: "Building, s" },
    { title: "Largest state, bytes" },
  ];
  /** @type {[string, any][]} */
  const methods = Object.entries(facts.methods ?? {});
  const rows = methods.map(([spec, { parameters = {}, source, state }]) => {
    const given = Object.entries(parameters).map(([name, value]) => `${name}=${inWords(value)}`);
    const bytes = {
      text: state ? state.largest_bytes.toLocaleString("en") : "–",
      order: state?.largest_bytes ?? NaN,
    };
    const seconds = figureCell(state?.build_seconds ?? NaN);
    return { cells: [spec, given.join(", "), inWords(source), seconds, bytes] };
  });
  tabulate(specsOf(number), columns, rows);
}
