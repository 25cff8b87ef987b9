"use strict";
/* The panel at the side: what is selected, with its inputs, outputs, paths and evidence; groups; an overview. */

fasttc.panel = (() => {
  const { el, percent, number, count, visible, token } = fasttc.base;
  const SHOWN = 8; // inputs and outputs listed
  const section = document.getElementById("selection"), groupList = document.getElementById("groups");
  let app = null, drawn = 0;

  const button = (text, action, extra = {}) => el("button", { type: "button", onclick: action, ...extra }, text);
  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));

  function update(current) {
    app = current;
    drawn++;
    const nodes = [...app.selection].map((key) => app.scene.byKey.get(key)).filter(Boolean);
    const content = nodes.length === 0 ? overview() : nodes.length === 1 ? details(nodes[0]) : several(nodes);
    section.replaceChildren(...content.filter(Boolean));
    groups();
  }

  /** Nothing selected: what this graph is. */
  function overview() {
    const [first] = app.graphs;
    const shown = app.view === "base" ? app.graphs[1] : first;
    const logits = app.scene.nodes.filter((node) => node.kind === "logit").slice(0, 5);
    const whole = shown.whole;
    return [
      el("h2", {}, "Prompt"),
      el("p", { class: "prompt" }, ...app.data.tokens.map((text) => el("code", {}, token(text)))),
      el("h3", {}, "Says"),
      el("ul", { class: "bars" }, ...logits.map((node) => bar(node.name, node.probability, 1, "plain", () => app.select(node.key)))),
      el("p", { class: "quiet" }, `${shown.model ? visible(shown.model) + " · " : ""}${count(whole.nodes)} nodes, ${count(whole.edges)} edges`
        + (whole.nodes > shown.n ? `; the ${count(shown.n)} nodes with most influence are in this page` : "")),
      el("p", { class: "quiet" }, "Press a node to read it, Shift and drag to select several, ? for keys."),
    ];
  }

  function bar(name, share, most, kind, action, note = percent(share)) {
    const fill = el("i", { class: kind });
    fill.style.width = `${Math.min((100 * Math.abs(share)) / most, 100)}%`;
    return el("li", {}, el("button", { type: "button", onclick: action }, el("span", { class: "what" }, name), el("span", { class: "value" }, note), fill));
  }

  const glyph = (node) => el("span", { class: `glyph ${node.kind} ${node.adapter ? "adapter" : ""} ${node.status ?? ""}`, "aria-hidden": "true" });
  const KIND = { feature: "Feature", error: "Error", token: "Token", logit: "Output", group: "Group" };

  function place(node) {
    const at = node.kind === "group" ? `${node.members.length} nodes` : node.kind === "logit" ? "next token" : `position ${node.position}`;
    const layer = node.kind === "feature" || node.kind === "error" ? `layer ${node.layer} · ` : "";
    const text = node.kind === "feature" || node.kind === "error" ? ` “${token(app.data.tokens[node.position])}”` : "";
    return `${layer}${at}${text}`;
  }

  /** One node or group. */
  function details(node) {
    const heading = el("div", { class: "heading" }, glyph(node), el("span", {}, node.adapter ? "Adapter feature" : KIND[node.kind]), el("span", { class: "quiet" }, place(node)));
    const name = el("input", {
      id: "label", type: "text", "aria-label": node.kind === "group" ? "Name of the group" : "Label", spellcheck: "false",
      placeholder: node.kind === "feature" ? `${node.number} (no label)` : node.name, maxlength: 200,
    });
    name.value = node.kind === "group" ? node.group : app.state.labels[node.id] ?? (node.kind === "feature" ? app.table.label[node.members[0]] : "");
    name.addEventListener("change", () => app.rename(node, name.value));
    name.addEventListener("keydown", (event) => { if (event.key === "Enter") name.blur(); });
    return [
      heading, name, actions(node), facts(node),
      node.kind === "group" ? memberList(node) : null,
      edgeList("Strongest inputs", app.scene.inputs[node.index], "source"),
      edgeList("Strongest outputs", app.scene.outputs[node.index], "target"),
      paths(node), evidence(node),
    ];
  }

  function actions(node) {
    if (node.kind === "group")
      return el("div", { class: "actions" }, button("Open", () => app.toggleGroup(node)), button("Ungroup", () => app.ungroup(node.group)));
    return el("div", { class: "actions" },
      button(node.pinned ? "Unpin" : "Pin", () => app.togglePins(), { "aria-pressed": String(node.pinned), id: "pin" }),
      node.inGroup ? button(`Close “${visible(node.inGroup)}”`, () => app.toggleGroup({ group: node.inGroup })) : null);
  }

  const CARRIED = { // the verdicts of `fasttc evaluate --base`
    kept: "It fires and writes as in the base: the base's label holds.",
    changed: "It fires or writes otherwise than in the base: the base's label may not hold.",
    "newly used": "It is active now and was not in the base.",
    dead: "It was active on none of the tokens looked at.",
  };

  function facts(node) {
    const both = (now, before) => `${percent(before)} → ${percent(now)}`, { diff } = app.scene;
    return el("dl", { class: "facts" },
      node.kind === "feature" ? fact("feature", node.number) : null,
      node.carried ? fact("since the base", el("span", { title: CARRIED[node.carried] ?? "" }, node.carried)) : null,
      node.activation === null ? null : fact("activation", number(node.activation)),
      node.kind === "logit" ? fact("probability", diff ? both(node.probability, node.probabilityBefore) : percent(node.probability))
        : fact("influence", diff ? both(node.share, node.shareBefore) : percent(node.influence)),
      node.status ? fact("change", el("span", { class: "status " + node.status }, node.status)) : null);
  }

  function memberList(node) {
    const { table } = app;
    return el("details", { open: node.members.length <= 12 }, el("summary", {}, "Members"),
      el("ul", { class: "members" }, ...node.members.map((row) => {
        const id = table.id[row];
        const name = app.state.labels[id] ?? (table.label[row] || (table.kind[row] === "error" ? "error" : table.number[row]));
        return el("li", {}, el("span", { class: `glyph ${table.kind[row]} ${table.owner[row]}`, "aria-hidden": "true" }), visible(name),
          el("span", { class: "quiet" }, ` ${table.layer[row] >= 0 ? "L" + table.layer[row] + " · " : ""}${token(app.data.tokens[table.position[row]] ?? "")}`),
          button("×", () => app.leaveGroup(node.group, id), { "aria-label": `Take ${visible(name)} out of the group`, class: "plain" }));
      })));
  }

  /** Inputs or outputs by share; in the diff by how much the share changed. */
  function edgeList(title, edges, end) {
    const value = (edge) => (app.scene.diff ? edge.change : edge.share);
    const listed = d3.sort(edges, (edge) => -Math.abs(value(edge))).slice(0, SHOWN).filter((edge) => value(edge) !== 0);
    if (!listed.length) return null;
    const most = Math.abs(value(listed[0]));
    return el("div", {}, el("h3", {}, title, el("span", { class: "quiet" }, app.scene.diff ? " change of share" : " share of the target’s input")),
      el("ul", { class: "bars" }, ...listed.map((edge) => {
        const node = app.scene.nodes[edge[end]];
        const name = el("span", {}, glyph(node), node.name, el("span", { class: "quiet" }, where(node)));
        return bar(name, value(edge), most, fasttc.edges.colourName(app.scene, edge), () => app.select(node.key), signed(value(edge)));
      })));
  }

  const where = (node) => (node.kind === "feature" || node.kind === "error" ? ` L${node.layer} ${token(app.data.tokens[node.position])}` : "");
  const signed = (share) => (share < 0 ? "−" : "+") + percent(Math.abs(share));

  /** The strongest paths through a node; pressing one shows it alone. */
  function paths(node) {
    if (app.scene.diff) return null;
    const found = fasttc.paths.through(app.scene, node.index, 4);
    if (!found.length || found[0].edges.length === 0) return null;
    return el("div", {}, el("h3", {}, "Strongest paths", el("span", { class: "quiet" }, " product of shares")),
      el("ul", { class: "paths" }, ...found.map((path) => {
        const stops = [path.edges[0].source, ...path.edges.map((edge) => edge.target)].map((at) => app.scene.nodes[at]);
        const text = stops.flatMap((stop, at) => [at ? el("span", { class: "arrow" }, "→") : null, el("span", {}, stop.name)]);
        return el("li", {}, el("button", {
          type: "button", class: path.sign < 0 ? "negative" : "positive", "aria-pressed": "false",
          onclick: (event) => app.showPath(event.currentTarget, path),
        }, el("span", { class: "stops" }, ...text.filter(Boolean)), el("span", { class: "value" }, signed(path.sign * path.strength))));
      })));
  }

  /** A place for the evidence of a feature, filled when it is there. */
  function evidence(node) {
    if (node.kind !== "feature" || !fasttc.evidence.given(app.data)) return null;
    const holder = el("div"), turn = drawn, key = app.table.evidence[node.members[0]];
    fasttc.evidence.find(app.data, key).then((found) => {
      if (turn === drawn) holder.replaceChildren(found ? fasttc.evidence.show(found) : fasttc.evidence.none(key));
    }, (error) => holder.replaceChildren(el("p", { class: "quiet" }, error.message)));
    return holder;
  }

  /** Several nodes: their sum, and making a group of them. */
  function several(nodes) {
    const name = el("input", { id: "group-name", type: "text", placeholder: "Name of a new group", "aria-label": "Name of a new group", maxlength: 200 });
    const make = () => app.group(name.value);
    name.addEventListener("keydown", (event) => { if (event.key === "Enter") make(); });
    return [
      el("div", { class: "heading" }, el("span", {}, `${nodes.length} nodes`), el("span", { class: "quiet" }, `influence ${percent(d3.sum(nodes, (node) => node.influence))}`)),
      el("div", { class: "actions" }, name, button("Group", make, { id: "group" })),
      el("div", { class: "actions" }, button("Pin", () => app.togglePins(), { id: "pin" }), button("Clear", () => app.clear())),
      el("ul", { class: "members" }, ...nodes.slice(0, 40).map((node) => el("li", {}, glyph(node),
        button(node.name, () => app.select(node.key), { class: "plain" }), el("span", { class: "quiet" }, where(node))))),
    ];
  }

  function groups() {
    const { groups: all } = app.state;
    groupList.replaceChildren(...(all.length === 0 ? [] : [
      el("h2", {}, "Groups"),
      el("ul", { class: "bars" }, ...all.map((group) => {
        const node = app.scene.byKey.get("group:" + group.name);
        const shown = node ? node.members.length : 0, open = app.state.open.includes(group.name);
        const note = open ? "open" : shown === group.members.length ? String(shown) : `${shown} of ${group.members.length}`;
        const most = d3.max(app.scene.nodes, (one) => (one.kind === "group" ? one.influence : 0)) || 1;
        return bar(visible(group.name), node?.influence ?? 0, most, "group", () => (open ? app.toggleGroup({ group: group.name }) : app.select("group:" + group.name)), note);
      })),
    ]));
  }

  return { update };
})();
