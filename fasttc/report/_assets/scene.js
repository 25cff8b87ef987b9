"use strict";
/* What is drawn: the nodes and edges of a view, pruned, filtered, with groups as single nodes. */

fasttc.scene = (() => {
  const FORCED_SHARE = 0.01; // inputs and outputs drawn for a pinned node that pruning would leave out
  const LEAST_CHANGE = 0.005; // of influence, as a share of the logits', that is called one (as in graph/diff.py)

  /** The kept part of a graph by rows of the node table; pinned nodes are kept whatever their influence. */
  function keptPart(graph, pruned, pinnedRows) {
    const { rowPtr, columns, values, mass, node } = graph;
    const on = Uint8Array.from(pruned.nodes);
    for (const row of pinnedRows) if (graph.local.has(row)) on[graph.local.get(row)] = 1;
    const edges = [];
    for (let t = 0; t < graph.n; t++) {
      if (!on[t]) continue;
      for (let e = rowPtr[t]; e < rowPtr[t + 1]; e++) {
        const s = columns[e];
        if (!on[s]) continue;
        const forced = !pruned.nodes[t] || !pruned.nodes[s];
        if (pruned.edges[e] || (forced && Math.abs(values[e]) >= FORCED_SHARE * mass[t])) edges.push(e);
      }
    }
    const rows = new Set();
    for (let i = 0; i < graph.n; i++) if (on[i]) rows.add(node[i]);
    return { graph, rows, edges };
  }

  /** Signed shares between display nodes, by "source>target"; the rule of circuit-tracer's supernodes. */
  function shares(part, display, among) {
    const { graph } = part;
    const own = new Map(); // target -> |input from its own group|
    const found = new Map(); // "s>t" -> Map(target node -> sum of signed weights)
    const visit = (e, t) => {
      const s = display.get(graph.node[graph.columns[e]]), target = display.get(graph.node[t]);
      if (s === undefined || target === undefined) return;
      if (s === target) return void own.set(t, (own.get(t) ?? 0) + Math.abs(graph.values[e]));
      const key = s + ">" + target;
      if (!found.has(key)) found.set(key, new Map());
      const sums = found.get(key);
      sums.set(t, (sums.get(t) ?? 0) + graph.values[e]);
    };
    for (let t = 0; t < graph.n; t++)
      if (display.has(graph.node[t]))
        for (let e = graph.rowPtr[t]; e < graph.rowPtr[t + 1]; e++) if (among(e, t)) visit(e, t);

    const outside = (t) => graph.mass[t] - (own.get(t) ?? 0);
    const total = new Map(); // display node -> sum of its members' outside fractions
    for (const [row, at] of display) {
      const t = graph.local.get(row);
      if (t !== undefined && graph.mass[t] > 0) total.set(at, (total.get(at) ?? 0) + outside(t) / graph.mass[t]);
    }
    const result = new Map();
    for (const [key, sums] of found) {
      const target = +key.split(">")[1];
      let share = 0, weight = 0;
      for (const [t, sum] of sums) {
        weight += sum;
        if (outside(t) > 0) share += sum / graph.mass[t] / total.get(target); // = fraction / total * sum / outside
      }
      result.set(key, { share, weight });
    }
    return result;
  }

  function nodeName(table, row) {
    const { base } = fasttc;
    if (table.kind[row] === "token") return base.token(table.label[row]);
    if (table.kind[row] === "logit") return base.token(table.label[row]);
    if (table.kind[row] === "error") return "error";
    return base.visible(table.label[row]) || table.number[row];
  }

  /** One display node for a row of the table, with what each graph says about it. */
  function single(app, row, parts) {
    const { table } = app, id = table.id[row];
    return {
      key: id, id, kind: table.kind[row], layer: table.layer[row], row: table.layer[row], position: table.position[row],
      feature: table.feature[row], number: table.number[row], adapter: table.owner[row] === "adapter", carried: table.carried[row],
      members: [row], name: fasttc.base.visible(app.state.labels[id] ?? nodeName(table, row)),
      labelled: Boolean(app.state.labels[id] || (table.kind[row] === "feature" && table.label[row])),
      ...values(parts, [row]),
    };
  }

  function groupNode(app, group, rows, parts) {
    const { table } = app;
    const layers = rows.map((row) => table.layer[row]), positions = rows.map((row) => table.position[row]);
    return {
      key: "group:" + group.name, id: null, kind: "group", group: group.name, members: rows, labelled: true,
      row: d3.mean(layers), layer: Math.round(d3.median(layers)), position: Math.round(d3.median(positions)),
      name: fasttc.base.visible(group.name), ...values(parts, rows),
    };
  }

  /** Sums over the members: influence and probability in each graph, and what changed from base to fine-tuned. */
  function values(parts, rows) {
    const of = (part, name) => d3.sum(rows, (row) => {
      const at = part.graph.local.get(row);
      return at === undefined ? 0 : part.graph[name][at];
    });
    const [now, before] = parts;
    const here = rows.map((row) => now.graph.local.get(row)).filter((at) => at < now.graph.features);
    const result = {
      influence: of(now, "influence"),
      probability: of(now, "start"),
      activation: rows.length === 1 && here.length ? now.graph.activations[here[0]] : null,
    };
    if (!before) return result;
    const influenceBefore = of(before, "influence"), probabilityBefore = of(before, "start");
    const share = (result.influence + result.probability) / now.graph.total;
    const shareBefore = (influenceBefore + probabilityBefore) / before.graph.total;
    const status = changeOf(shareBefore, share);
    return { ...result, influenceBefore, probabilityBefore, share, shareBefore, status };
  }

  function changeOf(before, now) {
    if (Math.abs(now - before) < LEAST_CHANGE || now === before) return "kept";
    if (before === 0) return "gained";
    if (now === 0) return "lost";
    return now > before ? "strengthened" : "weakened";
  }

  /**
   * The scene of the present view.
   * nodes: display nodes; edges: { source, target, share, weight, flow[, before, change] } by decreasing flow;
   * inputs / outputs: edges by display node.
   */
  function build(app) {
    const { table, state } = app;
    const rowOf = app.rowOf;
    const inGroups = state.groups.flatMap((group) => group.members);
    const pinnedRows = new Set([...state.pinned, ...(app.scope === "pinned" ? inGroups : [])]
      .map((id) => rowOf.get(id)).filter((row) => row !== undefined));
    const diff = app.view === "diff";
    const chosen = diff ? app.graphs : app.graphs.filter((graph) => graph.view === app.view);
    const parts = chosen.map((graph) => keptPart(graph, app.pruned.get(graph), pinnedRows));

    const listed = new Set(parts.flatMap((part) => [...part.rows]));
    const grouped = new Map();
    for (const group of state.groups) for (const id of group.members) grouped.set(rowOf.get(id), group);
    const visible = [...listed].filter((row) => !app.hidden.has(table.owner[row] || table.kind[row])
      && (app.scope === "all" || pinnedRows.has(row) || grouped.has(row)));

    const nodes = [], display = new Map(), members = new Map();
    for (const row of d3.sort(visible)) {
      const group = grouped.get(row);
      if (group && !state.open.includes(group.name)) {
        if (!members.has(group)) members.set(group, []);
        members.get(group).push(row);
      } else {
        display.set(row, nodes.length);
        nodes.push({ ...single(app, row, parts), inGroup: group?.name });
      }
    }
    for (const [group, rows] of members) {
      for (const row of rows) display.set(row, nodes.length);
      nodes.push(groupNode(app, group, rows, parts));
    }
    const pinned = new Set(state.pinned);
    nodes.forEach((node, index) => Object.assign(node, { index, pinned: node.id !== null && pinned.has(node.id) }));

    const edges = diff ? changes(parts, display, nodes) : plain(parts[0], display, nodes);
    edges.sort((a, b) => b.flow - a.flow);
    const inputs = nodes.map(() => []), outputs = nodes.map(() => []);
    for (const edge of edges) {
      inputs[edge.target].push(edge);
      outputs[edge.source].push(edge);
    }
    return { nodes, edges, inputs, outputs, diff, byKey: new Map(nodes.map((node) => [node.key, node])) };
  }

  function plain(part, display, nodes) {
    const kept = new Set(part.edges);
    return Array.from(shares(part, display, (e) => kept.has(e)), ([key, { share, weight }]) => {
      const [source, target] = key.split(">").map(Number);
      const flow = Math.abs(share) * (nodes[target].influence + nodes[target].probability);
      return { source, target, share, weight, flow, sign: Math.sign(share) };
    });
  }

  /** Edges kept in either graph with their share in both: `change` is the growth of |share|. */
  function changes(parts, display, nodes) {
    const pair = (graph, e, t) => graph.node[graph.columns[e]] * 2 ** 26 + graph.node[t];
    const either = new Set();
    for (const { graph, edges } of parts) {
      const kept = new Set(edges);
      for (let t = 0; t < graph.n; t++)
        for (let e = graph.rowPtr[t]; e < graph.rowPtr[t + 1]; e++) if (kept.has(e)) either.add(pair(graph, e, t));
    }
    const [now, before] = parts.map((part) => shares(part, display, (e, t) => either.has(pair(part.graph, e, t))));
    return Array.from(new Set([...now.keys(), ...before.keys()]), (key) => {
      const [source, target] = key.split(">").map(Number), node = nodes[target];
      const { share = 0, weight = 0 } = now.get(key) ?? {}, old = before.get(key)?.share ?? 0;
      const change = Math.abs(share) - Math.abs(old);
      const through = Math.max(node.influence + node.probability, node.influenceBefore + node.probabilityBefore);
      return { source, target, share, weight, before: old, change, flow: Math.abs(change) * through, sign: Math.sign(change) };
    });
  }

  return { build };
})();
