// Which pattern of blocks covers each head's attention best.
import { methodChosen } from "./chosen.js";
import { at } from "./document.js";
import { cell, gridAt } from "./figures.js";
import { drawMap } from "./maps.js";
import { runOf } from "./results.js";
import { counted, shown } from "./words.js";
/** @import { Entry, Patterns } from "./results.js" */

/** What the kinds have besides the first block and the own. @type {Record<string, string>} */
const WORDS = {
  given: "the first block and the own",
  local: "the most recent blocks",
  vertical: "the best columns",
  slash: "the best diagonals",
  block: "the best blocks",
};

/** Show the patterns of the run that the chosen method is of, if it has any. */
export function drawPatterns() {
  const entry = methodChosen(), { patterns, facts } = runOf(entry);
  at("patterns").hidden = at("map-patterns").hidden = !patterns;
  if (!patterns) return;
  const { kinds, colours, enough } = patterns, best = gridAt(entry, patterns.best);
  const last = kinds.length - 1, share = `${Math.round(100 * patterns.share)} %`;
  at("patterns-caption").textContent =
    `What covers a head's attention best with ${share} of the pairs of blocks (${facts.protocol}) ` +
    "besides the first block and the own: the most recent blocks (local), columns (vertical), " +
    `diagonals (slash), or single blocks (block) where none of these holds ${100 * enough} % of ` +
    "what the best blocks hold. " +
    kinds.map((kind, i) => `${kind} ${counted(best.filter((own) => own === i).length, "head")}`)
      .join(", ") +
    ".";
  drawMap("map-patterns", {
    entry,
    values: best,
    words: "pattern",
    scale: {
      colours: colours.flatMap((colour, i) =>
        [i, i + 1].map((edge) => /** @type {[number, string]} */ ([edge / (last + 1), colour]))
      ),
      least: -0.5,
      most: last + 0.5,
      title: "",
      names: kinds,
    },
    told: (layer, head) => told(entry, patterns, layer, head),
  });
}

/**
 * A head's kind, and what each pattern holds.
 * @param {Entry} entry
 * @param {Patterns} patterns
 * @param {number} layer
 * @param {number} head
 */
function told(entry, { kinds, best, held }, layer, head) {
  const of = (/** @type {number} */ place) => cell(entry, gridAt(entry, place), layer, head);
  const kind = kinds[of(best)];
  if (kind === undefined) return "no sequence is long enough";
  const lines = Object.entries(held).map(([name, place]) => `${WORDS[name]}: ${shown(of(place))}`);
  return [kind, ...lines].join("<br>");
}
