"use strict";
/* Puts the parts together: what is selected and shown, and what happens when that changes. */

fasttc.app = (() => {
  const { json } = fasttc.base, { state } = fasttc;
  const data = json("page-data"), saved = json("page-state");
  const table = data.nodes;
  const app = {
    data, table,
    graphs: data.graphs.map((graph) => fasttc.graph.open(graph, table, data.layers)),
    rowOf: new Map(table.id.map((id, row) => [id, row])),
    pruned: new Map(),
    view: data.graphs[0].view, scope: "all", shares: data.graphs[0].thresholds,
    hidden: new Set(), selection: new Set(), focusKey: null, found: null, path: null,
    get state() { return state.current; },
  };

  /** Where edited state goes: the server's file, or this browser. */
  async function store(content) {
    if (!data.served) {
      localStorage.setItem(storageKey, content);
      return "Saved in this browser. Export keeps it as a file.";
    }
    const answer = await fetch("state", { method: "POST", headers: { "Content-Type": "application/json" }, body: content });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return `Saved to ${data.state_file}`;
  }

  const memory = `fasttc:${data.name}:${table.id.length}:${data.prompt}:`; // of all pages of this graph
  const storageKey = memory + data.origin; // of those that started like this one

  /** The content of a supernode file, or null where there is none; a broken one is passed over. */
  function readable(content) {
    try {
      if (content) state.parse(content);
      return content;
    } catch (error) {
      app.say(`Saved state was not read: ${error.message}`);
      return null;
    }
  }

  /** What this browser keeps: what was edited in this page, and in pages of this graph that started otherwise. */
  function remembered() {
    try {
      const keys = Object.keys(localStorage).filter((key) => key.startsWith(memory) && key.length === storageKey.length);
      const found = new Map(keys.map((key) => [key, readable(JSON.parse(localStorage.getItem(key)))]).filter(([, content]) => content));
      return { own: found.get(storageKey), others: [...found.values()] };
    } catch {
      return { others: [] }; // storage may be forbidden, or hold something else
    }
  }

  /** Starts with what was edited in this page, else with what came with it; edits of an earlier page are then an undo away. */
  function startState() {
    const { own, others } = data.served ? { others: [] } : remembered();
    if (own) return state.start(own, store);
    state.start(readable(saved), store, others);
    if (others.length) app.say("This file was written anew. Undo shows what was edited in the one before.");
  }

  app.say = (text) => { document.getElementById("saved").textContent = text; };

  function prune() {
    for (const graph of app.graphs) app.pruned.set(graph, fasttc.graph.prune(graph, ...app.shares));
  }

  /** Everything that depends on what is shown. */
  function rebuild() {
    app.scene = fasttc.scene.build(app);
    for (const key of app.selection) if (!app.scene.byKey.has(key)) app.selection.delete(key);
    app.path = null;
    fasttc.controls.update(); // the legend first: the drawing stands above it
    fasttc.draw.update(app);
    if (app.found) fasttc.controls.search();
    fasttc.panel.update(app);
  }

  function selected() {
    app.path = null;
    fasttc.draw.marks();
    fasttc.draw.labels();
    fasttc.panel.update(app);
  }

  const selectedNodes = () => [...app.selection].map((key) => app.scene.byKey.get(key));

  /** Why nodes are not made one group, or null: what is explained of errors or outputs and other nodes has no meaning. */
  function apart(ids) {
    const alone = ["error", "logit"], kinds = new Set(ids.map((id) => table.kind[app.rowOf.get(id)]).filter(Boolean));
    if (kinds.size < 2 || !alone.some((kind) => kinds.has(kind))) return null;
    return `Not grouped: ${kinds.has("error") ? "errors" : "outputs"} merge with their like only.`;
  }

  Object.assign(app, {
    select(key, add = false, reveal = false) {
      if (!app.scene.byKey.has(key)) return;
      if (!add) app.selection = new Set([key]);
      else if (!app.selection.delete(key)) app.selection.add(key);
      app.focusKey = key;
      selected();
      if (reveal) fasttc.draw.reveal(key);
    },
    selectMany(keys) {
      app.selection = new Set([...app.selection, ...keys]);
      selected();
    },
    clear() {
      if (!app.selection.size && !app.path) return;
      app.selection = new Set();
      selected();
    },
    focus(key) {
      app.focusKey = key;
    },
    hover(key) {
      if (app.selection.size || app.path) return;
      const node = app.scene.byKey.get(key);
      fasttc.draw.highlight(node ? touching(node) : null);
    },
    /** Edges to bring forward, or null. */
    frontEdges() {
      if (app.path) return app.path.edges;
      if (!app.selection.size) return null;
      return [...new Set([...app.selection].flatMap((key) => touching(app.scene.byKey.get(key))))];
    },
    showPath(button, path) {
      app.path = app.path === path ? null : path;
      for (const other of document.querySelectorAll(".paths button")) other.setAttribute("aria-pressed", String(other === button && app.path !== null));
      fasttc.draw.marks();
    },
    setFound(nodes) {
      app.found = nodes ? new Set(nodes.map((node) => node.key)) : null;
      fasttc.draw.marks();
    },
    setView(view) {
      if (app.graphs.length < 2 || view === app.view) return;
      app.view = view;
      state.keep({ view });
      rebuild();
    },
    setScope(scope) {
      app.scope = scope;
      rebuild();
    },
    setShares(shares) {
      app.shares = shares;
      state.keep({ shares });
      prune();
      rebuild();
    },
    toggleKind(kind) {
      if (!app.hidden.delete(kind)) app.hidden.add(kind);
      state.keep({ hidden: [...app.hidden] });
      rebuild();
    },
    togglePins() {
      if (app.selection.size) state.togglePins(selectedNodes().flatMap((node) => node.members.map((row) => table.id[row])));
    },
    group(name) {
      if (app.selection.size < 1) return;
      const ids = selectedNodes().flatMap((node) => (node.kind === "group" ? state.members(node.group) : [node.id]));
      const refused = apart(ids);
      if (refused) return void app.say(refused);
      const made = state.group(ids, name);
      app.select("group:" + made, false, true);
    },
    ungroup(name) {
      state.ungroup(name);
    },
    ungroupSelected() {
      for (const key of app.selection) if (key.startsWith("group:")) state.ungroup(app.scene.byKey.get(key).group);
    },
    leaveGroup(name, id) {
      state.change((next) => {
        const group = next.groups.find((one) => one.name === name);
        group.members = group.members.filter((member) => member !== id);
        next.groups = next.groups.filter((one) => one.members.length);
      });
    },
    toggleGroup({ group }) {
      if (!group) return;
      state.change((next) => {
        next.open = next.open.includes(group) ? next.open.filter((name) => name !== group) : [...next.open, group];
      });
    },
    toggleSelected() {
      for (const key of app.selection) {
        const node = app.scene.byKey.get(key);
        app.toggleGroup({ group: node?.group ?? node?.inGroup });
      }
    },
    rename(node, text) {
      if (node.kind !== "group") return state.label(node.id, text);
      app.selection.delete(node.key);
      app.select("group:" + state.renameGroup(node.group, text));
    },
    /** Takes over the content of a supernode file; one undo brings back what was there. */
    read(content) {
      const next = state.parse(content);
      const unknown = new Set([...next.groups.flatMap((group) => group.members), ...next.pinned].filter((id) => !app.rowOf.has(id)));
      state.set(next);
      app.say(unknown.size ? `Read. ${unknown.size} of its nodes are not in this graph.` : "Read.");
    },
  });

  const touching = (node) => (node ? [...app.scene.inputs[node.index], ...app.scene.outputs[node.index]] : []);

  function start() {
    document.title = fasttc.base.visible(data.prompt || data.name);
    startState();
    const { view, shares, hidden } = state.settings;
    if (app.graphs.length === 2 && ["base", "finetuned", "diff"].includes(view)) app.view = view;
    if (Array.isArray(shares) && shares.length === 2 && shares.every((share) => share >= 0 && share <= 1)) app.shares = shares;
    if (Array.isArray(hidden)) app.hidden = new Set(hidden);
    state.listeners.on("change", rebuild);
    state.listeners.on("saved", app.say);
    fasttc.controls.start(app);
    fasttc.keys.start(app);
    fasttc.export.start(app);
    fasttc.draw.start();
    prune();
    rebuild();
    new ResizeObserver(() => fasttc.draw.update(app)).observe(document.getElementById("stage"));
    requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.ready = Math.round(performance.now()); }));
  }

  start();
  return app;
})();
