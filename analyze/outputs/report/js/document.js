// The parts of the page's document. What comes from results enters it as text, never as HTML.

/** @param {string} id */
export const at = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {string} id */
export const selectAt = (id) => /** @type {HTMLSelectElement} */ (at(id));

/** @typedef {Node | string} Part */

/**
 * A new element with parts in it.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Part | Part[]} content
 * @param {Record<string, string | number>} attributes
 */
export function element(tag, content = "", attributes = {}) {
  const made = document.createElement(tag);
  made.append(...[content].flat());
  setAll(made, attributes);
  return made;
}

/**
 * A new element of a drawing.
 * @param {string} tag
 * @param {Part | Part[]} content
 * @param {Record<string, string | number>} attributes
 */
export function shape(tag, content = "", attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  made.append(...[content].flat());
  setAll(made, attributes);
  return made;
}

/** @param {Element} made @param {Record<string, string | number>} attributes */
function setAll(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
}
