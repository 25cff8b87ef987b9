"use strict";
/* What every part of the page uses: elements made without markup, text made safe to show, numbers, colours. */

globalThis.fasttc = {};

fasttc.base = (() => {
  /** An element with attributes and children. Strings become text nodes: no data is ever parsed as markup. */
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child != null));
    return element;
  }

  const NAMED = { "\n": "⏎", "\r": "⏎", "\t": "⇥" };
  // Control characters, and those that turn the direction of what follows.
  const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

  /** Text as it may be shown in one line, in a page and in an SVG file alike. */
  function visible(text) {
    return String(text).toWellFormed().replace(UNSEEN, (character) => NAMED[character] ?? "·");
  }

  /** A token: its leading space is part of it, but need not be seen. */
  function token(text) {
    const shown = visible(text).trim();
    return shown === "" ? "␣" : shown;
  }

  const context = document.createElement("canvas").getContext("2d");
  const widths = new Map();

  /** Width of a text in pixels. */
  function width(text, font) {
    const key = font + "\u0000" + text;
    if (!widths.has(key)) {
      context.font = font;
      widths.set(key, context.measureText(text).width);
    }
    return widths.get(key);
  }

  /** The text, cut with an ellipsis where it is wider than `room` pixels. */
  function fit(text, room, font) {
    if (width(text, font) <= room) return text;
    const characters = [...text];
    let low = 0, high = characters.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (width(characters.slice(0, middle).join("") + "…", font) <= room) low = middle;
      else high = middle - 1;
    }
    return low === 0 ? "" : characters.slice(0, low).join("") + "…";
  }

  const percent = (share) => Number.isNaN(share) ? "–" : (100 * share).toFixed(Math.abs(share) < 0.1 ? 1 : 0) + " %";
  const number = (value) => value == null || Number.isNaN(value) ? "–" : d3.format(".3~g")(value);
  const count = d3.format(",");

  /** A colour of the theme by its name in the style sheet. */
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function json(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  return { el, visible, token, width, fit, percent, number, count, colour, json };
})();
