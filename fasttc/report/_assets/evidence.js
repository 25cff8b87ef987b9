"use strict";
/* Feature evidence: promoted and suppressed tokens, activations, examples. From the page itself or from its server. */

fasttc.evidence = (() => {
  const { el, token, visible, number } = fasttc.base;
  const known = new Map();

  /** Whether there is evidence of any feature. */
  const given = (data) => (data.served ? data.has_evidence : Object.keys(data.evidence).length > 0);

  /** What is known of a feature by its key in the node table (owner, layer, index), or null. */
  async function find(data, key) {
    if (!key || !given(data)) return null;
    if (!data.served) return data.evidence[key] ?? null;
    if (!known.has(key)) {
      const answer = await fetch(`features/${key}`);
      if (!answer.ok) throw new Error((await answer.text()).trim());
      known.set(key, await answer.json());
    }
    return known.get(key);
  }

  /** A feature of which nothing is known, where something is known of others. */
  function none(key) {
    const why = key === "" ? "No evidence here: what was given is of the fine-tuned model, where this number is another feature."
      : key.startsWith("adapter") ? "No evidence of this adapter’s feature here." : "No evidence of this feature here.";
    return el("p", { class: "quiet" }, why);
  }

  const tokens = (title, list, kind) => list.length === 0 ? null
    : el("div", { class: "logits " + kind }, el("h4", {}, title), el("p", {}, ...list.map((text) => el("code", {}, token(text)))));

  function histogram(counts, [low, high]) {
    const most = Math.max(...counts);
    const bars = counts.map((count) => {
      const bar = el("i");
      bar.style.height = `${most > 0 ? Math.max((100 * count) / most, count > 0 ? 4 : 0) : 0}%`;
      return bar;
    });
    return el("figure", { class: "histogram" }, el("div", { "aria-hidden": "true" }, ...bars),
      el("figcaption", {}, el("span", {}, number(low)), "activation", el("span", {}, number(high))));
  }

  /** One example: its tokens, the more active the more coloured. */
  function example({ tokens: texts, acts }) {
    const most = Math.max(...acts, 1e-9);
    return el("p", { class: "example" }, ...texts.map((text, at) => {
      const share = Math.max(acts[at] / most, 0);
      const span = el("span", share > 0 ? { title: number(acts[at]) } : {}, visible(text));
      if (share > 0) span.style.setProperty("--active-share", `${Math.round(12 + 68 * share)}%`);
      if (share > 0) span.className = "active";
      return span;
    }));
  }

  /** The whole section as an element. */
  function show(found) {
    const groups = found.groups.filter((group) => group.examples.length);
    return el("div", { class: "evidence" },
      el("h3", {}, "Feature evidence"),
      found.frequency === null ? null : el("p", { class: "quiet" }, `active on ${d3.format(".2~g")(100 * found.frequency)} % of tokens`),
      tokens("Promotes", found.top, "up"), tokens("Suppresses", found.bottom, "down"),
      tokens("Driven by", found.embeddings, "driven"),
      found.histogram.length ? histogram(found.histogram, found.range) : null,
      ...groups.map((group, at) => el("details", { open: at === 0 }, el("summary", {}, visible(group.name)), ...group.examples.map(example))));
  }

  return { find, given, none, show };
})();
