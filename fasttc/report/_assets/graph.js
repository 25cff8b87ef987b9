"use strict";
/* A graph, its influence, its pruning and its scores: the same rules as fasttc.graph, in the same order of sums. */

fasttc.graph = (() => {
  const FLOOR = 1e-10; // under a row's absolute sum

  /** A graph in its own numbering. Rows are targets, columns are sources; `node[i]` is its row in the table. */
  function open(data, table, layers) {
    const n = data.nodes.length;
    const node = Int32Array.from(data.nodes);
    const kind = Array.from(node, (row) => table.kind[row]);
    const layer = Int32Array.from(node, (row) => table.layer[row]);
    const rowPtr = Int32Array.from(data.row_ptr);
    const columns = Int32Array.from(data.columns);
    const exact = (name) => Float64Array.from(data.single.includes(name) ? Float32Array.from(data[name]) : data[name]);
    const [values, remainder, probabilities] = ["values", "remainder", "probabilities"].map(exact);
    const firstLogit = n - probabilities.length;
    const start = new Float64Array(n);
    start.set(probabilities, firstLogit);

    // Rows with inputs, from the logits down to the lowest layer: no row of a block is a source of another.
    const features = data.activations.length;
    const blocks = [[firstLogit, n]];
    for (let l = layers - 1, last = features; l >= 0; l--) {
      let first = last;
      while (first > 0 && layer[first - 1] === l) first--;
      if (first < last) blocks.push([first, last]);
      last = first;
    }
    const graph = {
      ...data, n, node, kind, layer, rowPtr, columns, values, remainder, start, blocks, features, firstLogit,
      firstToken: kind.indexOf("token"),
      local: new Map(Array.from(node, (row, at) => [row, at])),
    };
    graph.total = d3.sum(start);
    graph.stored = mass(graph);
    graph.mass = graph.stored.map((sum, at) => sum + remainder[at]);
    graph.influence = sweep(graph, graph.mass);
    return graph;
  }

  /** Absolute sum of each row's edges, of those that `edge` says are there. */
  function mass(graph, edge = () => true) {
    const sums = new Float64Array(graph.n);
    for (let t = 0; t < graph.n; t++)
      for (let e = graph.rowPtr[t]; e < graph.rowPtr[t + 1]; e++)
        if (edge(e, t)) sums[t] += Math.abs(graph.values[e]);
    return sums;
  }

  /** `w P + w P² + ...`: one pass from the logits down, over the edges that `edge` says are there. */
  function sweep(graph, rowMass, edge = () => true) {
    const arrived = new Float64Array(graph.n);
    for (const [first, last] of graph.blocks) {
      const sum = new Float64Array(graph.n); // block by block, as numpy adds them
      for (let t = first; t < last; t++) {
        const scale = (arrived[t] + graph.start[t]) / Math.max(rowMass[t], FLOOR);
        if (scale === 0) continue;
        for (let e = graph.rowPtr[t]; e < graph.rowPtr[t + 1]; e++)
          if (edge(e, t)) sum[graph.columns[e]] += Math.abs(graph.values[e]) * scale;
      }
      for (let s = 0; s < graph.n; s++) arrived[s] += sum[s];
    }
    return arrived;
  }

  /** The score at which the cumulative share of the scores, from the highest down, reaches `share`. */
  function shareThreshold(scored, share) {
    const ascending = Float64Array.from(scored).sort();
    const last = ascending.length - 1;
    if (last < 0 || ascending[last] <= 0) return 0;
    if (share <= 0) return ascending[last];
    if (share >= 1) return ascending.find((score) => score > 0);
    const cumulative = new Float64Array(ascending.length);
    let sum = 0;
    for (let i = 0; i <= last; i++) cumulative[i] = sum += ascending[last - i];
    const at = d3.bisector((value, limit) => value / sum - limit).left(cumulative, share);
    return ascending[last - Math.min(at, last)];
  }

  /** Nodes, then edges, that carry the given shares of the influence; then dead ends go. Masks over the graph. */
  function prune(graph, nodeShare, edgeShare) {
    const { n, rowPtr, columns, values } = graph;
    const lowest = shareThreshold(graph.influence, nodeShare);
    let nodes = Uint8Array.from(graph.influence, (value, at) => value >= lowest || at >= graph.firstToken);

    const among = (e, t) => nodes[t] && nodes[columns[e]];
    const kept = mass(graph, among);
    const arrived = sweep(graph, kept, among);
    const at = [], target = [], scored = [];
    for (let t = 0; t < n; t++) {
      const scale = (arrived[t] + graph.start[t]) / Math.max(kept[t], FLOOR);
      for (let e = rowPtr[t]; e < rowPtr[t + 1]; e++)
        if (among(e, t)) {
          at.push(e);
          target.push(t);
          scored.push(Math.abs(values[e]) * scale);
        }
    }
    const least = shareThreshold(scored, edgeShare);
    const edges = new Uint8Array(values.length);
    let live = [];
    for (let i = 0; i < at.length; i++) if (scored[i] >= least) live.push(i);

    for (let changed = true; changed;) {
      const output = new Uint8Array(n), input = new Uint8Array(n);
      for (const i of live) {
        output[columns[at[i]]] = 1;
        input[target[i]] = 1;
      }
      const alive = nodes.map((on, node) =>
        on && (node >= graph.firstToken || (output[node] && (node >= graph.features || input[node]))) ? 1 : 0);
      changed = alive.some((on, node) => on !== nodes[node]);
      nodes = alive;
      live = live.filter((i) => nodes[target[i]] && nodes[columns[at[i]]]);
    }
    for (const i of live) edges[at[i]] = 1;
    return { nodes, edges, nodeCount: d3.sum(nodes), edgeCount: live.length };
  }

  /** Scores of what was kept; the mass of everything dropped counts as unexplained. */
  function prunedScores(graph, pruned) {
    const there = (e) => pruned.edges[e];
    const kept = mass(graph, there);
    const lost = graph.remainder.map((missing, t) => missing + Math.max(graph.stored[t] - kept[t], 0));
    for (let t = 0; t < graph.n; t++) if (t < graph.features && !pruned.nodes[t]) lost[t] = 0;
    const whole = kept.map((sum, t) => sum + lost[t]);
    return scores(graph, sweep(graph, whole, there), whole, lost, pruned.nodes);
  }

  /** Replacement and completeness (methods: `fasttc.graph.Scores`); `lost` is mass that counts as error. */
  function scores(graph, arrived, rowMass, lost, nodes = null) {
    let tokens = 0, errors = 0, visited = 0, rows = 0, missing = 0;
    for (let t = 0; t < graph.n; t++) {
      const here = arrived[t] + graph.start[t];
      visited += here;
      if (graph.kind[t] === "token") tokens += arrived[t];
      else if (graph.kind[t] === "error") errors += arrived[t];
      else if (!nodes || t >= graph.features || nodes[t]) {
        rows += here;
        missing += (here * lost[t]) / Math.max(rowMass[t], FLOOR);
      }
    }
    const ratio = (part, all) => (all > 0 ? part / all : NaN);
    return {
      replacement: ratio(tokens, tokens + errors + missing),
      completeness: 1 - ratio(errors + missing, visited + missing),
      completeness_rows: 1 - ratio(errors + missing, rows),
    };
  }

  return { open, prune, prunedScores };
})();
