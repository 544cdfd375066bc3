// The page comes up: read, offered, shown.
import { listen, offer, show } from "./choosing.js";
import { at } from "./document.js";
import { readFigures } from "./figures.js";
import { tabulateLocality } from "./locality.js";
import { loadPlotly } from "./plot.js";
import { describe, describeRuns } from "./runs.js";
import { tabulateTails } from "./tails.js";

async function begin() {
  await loadPlotly();
  await readFigures();
  offer();
  describe();
  describeRuns();
  tabulateTails();
  tabulateLocality();
  at("main").hidden = false;
  show();
  listen();
  at("status").hidden = true;
  document.body.dataset.ready = "";
}

begin().catch((error) => {
  at("status").textContent =
    `The figures cannot be read: ${error}. The page takes a browser of 2023 or newer.`;
  throw error;
});
