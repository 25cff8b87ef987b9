"use strict";
/* The bar above and the sliders: which graph, how much of it, search, theme, undo, legend. */

fasttc.controls = (() => {
  const { el, percent, count, visible } = fasttc.base;
  const $ = (id) => document.getElementById(id);
  let app = null;

  const ICONS = {
    undo: "M6 4 2.5 7.5 6 11M3 7.5h7a3.5 3.5 0 0 1 0 7H7",
    redo: "M10 4l3.500 3.500L10 11M13 7.500H6a3.500 3.500 0 0 0 0 7h3",
    fit: "M2 6V2h4M14 6V2h-4M2 10v4h4M14 10v4h-4",
    theme: "M8 2a6 6 0 1 0 0 12zM8 2a6 6 0 0 1 0 12",
    help: "M5.500 6a2.500 2.500 0 1 1 3.600 2.200c-.8.4-1.100.9-1.100 1.800M8 12.500v.6",
    export: "M8 2v8M4.500 7 8 10.500 11.500 7M2.500 13.500h11",
  };

  function icons() {
    for (const holder of document.querySelectorAll("[data-icon]")) {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 16 16");
      svg.setAttribute("aria-hidden", "true");
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("d", ICONS[holder.dataset.icon]);
      svg.append(path);
      holder.append(svg);
    }
  }

  /** A row of radio buttons; arrow keys move between them as the browser has it. */
  function choice(id, options, current, action) {
    $(id).replaceChildren(...options.map(([value, text, title]) => {
      const input = el("input", { type: "radio", name: id, value });
      input.checked = value === current;
      input.addEventListener("change", () => action(value));
      return el("label", { title }, input, el("span", {}, text));
    }));
  }

  function sliders() {
    for (const [at, id] of ["node-share", "edge-share"].entries()) {
      const input = $(id);
      input.value = app.shares[at];
      let queued = false;
      input.addEventListener("input", () => {
        if (queued) return;
        queued = true;
        requestAnimationFrame(() => {
          queued = false;
          app.setShares(at === 0 ? [+input.value, app.shares[1]] : [app.shares[0], +input.value]);
        });
      });
    }
  }

  const WHY = {
    replacement: "Influence of the tokens as a share of that of tokens, errors and everything left out",
    completeness: "Share of what enters a node that is not from errors or left out, weighted by influence",
  };

  /** Live scores of what is kept, beside those of the whole graph. */
  function scores() {
    for (const [at, id] of ["node-share", "edge-share"].entries()) {
      $(id).value = app.shares[at];
      document.querySelector(`output[for=${id}]`).textContent = (100 * app.shares[at]).toFixed(at ? 1 : 0) + " %";
    }
    const graph = app.view === "base" ? app.graphs[1] : app.graphs[0];
    const pruned = app.pruned.get(graph), kept = fasttc.graph.prunedScores(graph, pruned);
    const kinds = d3.rollup(d3.range(graph.n).filter((at) => pruned.nodes[at]), (all) => all.length, (at) => graph.kind[at]);
    const line = (name, value, of, title) => el("div", { title }, el("dt", {}, name), el("dd", {}, value, el("span", { class: "quiet" }, of)));
    $("scores").replaceChildren(
      line("features", count(kinds.get("feature") ?? 0), ` of ${count(graph.features)}`),
      line("edges", count(pruned.edgeCount), ` of ${count(graph.values.length)}`),
      line("replacement", percent(kept.replacement), ` of ${percent(graph.scores.replacement ?? NaN)}`, WHY.replacement),
      line("completeness", percent(kept.completeness), ` of ${percent(graph.scores.completeness ?? NaN)}`, WHY.completeness));
    $("scores").dataset.kept = JSON.stringify({ nodes: pruned.nodeCount, edges: pruned.edgeCount, ...kept });
  }

  const KINDS = [["feature", "feature"], ["adapter", "adapter feature: of what fine-tuning changed"], ["error", "error: what the transcoder missed"], ["token", "token"], ["logit", "output"]];
  const STATUS = [ // the words and the rule of `fasttc graph diff`
    ["gained", "Has influence in the fine-tuned graph only"], ["lost", "Has influence in the base graph only"],
    ["strengthened", "Has more influence than in the base graph"], ["weakened", "Has less influence than in the base graph"],
    ["kept", "Influence changed by less than 0.5 % of the logits'"],
  ];

  /** What shapes and colours mean; kinds of nodes can be hidden by pressing them. */
  function legend() {
    const { scene } = app;
    const adapters = app.table.owner.includes("adapter");
    const kinds = KINDS.filter(([kind]) => kind !== "adapter" || adapters).map(([kind, text]) => el("button", {
      type: "button", class: "kind", "aria-pressed": String(!app.hidden.has(kind)), title: `Show or hide: ${text}`, onclick: () => app.toggleKind(kind),
    }, el("span", { class: `glyph ${kind === "adapter" ? "feature adapter" : kind}`, "aria-hidden": "true" }), text.split(":")[0]));
    const swatch = (name, text, title) => el("span", { class: "entry", title }, el("span", { class: "line " + name, "aria-hidden": "true" }), text);
    const edges = scene.diff
      ? [swatch("gained", "edge grew", "Share of the target's input grew"), swatch("lost", "edge shrank", "Share of the target's input shrank")]
      : [swatch("positive", "raises", "Raises its target"), swatch("negative", "lowers", "Lowers its target")];
    const status = scene.diff ? STATUS.map(([name, title]) =>
      el("span", { class: "entry", title }, el("span", { class: "glyph feature " + name, "aria-hidden": "true" }), name)) : [];
    const drawn = Math.min(scene.edges.length, fasttc.edges.MOST);
    const note = drawn < scene.edges.length ? `strongest ${count(drawn)} of ${count(scene.edges.length)} edges drawn` : `${count(drawn)} edges`;
    $("legend").replaceChildren(...kinds, ...status, ...edges,
      el("span", { class: "quiet", title: "Size of a node: influence on the outputs. Width of an edge: its share of the target's input times the target's influence." }, note));
  }

  function update() {
    $("undo").disabled = !fasttc.state.canUndo;
    $("redo").disabled = !fasttc.state.canRedo;
    for (const input of document.querySelectorAll("#views input")) input.checked = input.value === app.view;
    for (const input of document.querySelectorAll("#scope input")) input.checked = input.value === app.scope;
    scores();
    legend();
  }

  /** Nodes whose name, id, token or layer holds every word that was typed. */
  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (node) => [node.name, node.id ?? "", node.kind, node.layer >= 0 ? `L${node.layer}` : "", app.data.tokens[node.position] ?? "",
      ...node.members.map((row) => `${app.table.number[row]} ${app.table.label[row]}`)].join(" ").toLowerCase();
    const found = words.length ? app.scene.nodes.filter((node) => { const own = text(node); return words.every((word) => own.includes(word)); }) : null;
    app.setFound(found);
    $("found").textContent = found ? count(found.length) : "";
  }

  function searchKeys(event) {
    if (event.key === "Enter" && app.found?.size) {
      const keys = [...app.found], at = keys.indexOf([...app.selection][0]);
      app.select(keys[(at + (event.shiftKey ? keys.length - 1 : 1)) % keys.length], false, true);
      event.preventDefault();
    } else if (event.key === "Escape") {
      $("search").value = "";
      search();
      $("search").blur();
    }
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  let theme = null; // as chosen here; null follows the system

  function applyTheme() {
    document.documentElement.dataset.theme = theme ?? (system.matches ? "dark" : "light");
    fasttc.draw.request();
  }

  function start(current) {
    app = current;
    icons();
    const views = app.graphs.length === 2
      ? [["base", "Base"], ["finetuned", "Fine-tuned"], ["diff", "Diff", "What fine-tuning changed"]] : [];
    choice("views", views, app.view, (view) => app.setView(view));
    $("views").hidden = views.length === 0;
    choice("scope", [["all", "All"], ["pinned", "Pinned", "Pinned nodes and groups only"]], app.scope, (scope) => app.setScope(scope));
    sliders();
    $("prompt").textContent = visible(app.data.prompt || app.data.tokens.join("")) || "Attribution graph";
    $("search").addEventListener("input", search);
    $("search").addEventListener("keydown", searchKeys);
    $("undo").addEventListener("click", fasttc.state.undo);
    $("redo").addEventListener("click", fasttc.state.redo);
    $("fit").addEventListener("click", () => fasttc.draw.fit());
    $("theme").addEventListener("click", () => {
      theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      applyTheme();
    });
    system.addEventListener("change", applyTheme);
    applyTheme();
  }

  return { start, update, search };
})();
