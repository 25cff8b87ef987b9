"use strict";
/* Strongest paths through a node: k best on the drawn graph, where a path is as strong as the product of its shares. */

fasttc.paths = (() => {
  /** k best chains from each node to an end, following `links(node)`; `order` lists every node before it is needed. */
  function best(order, links, ends, k) {
    const chains = new Map();
    for (const node of order) {
      const found = ends(node) > 0 ? [{ strength: ends(node), node, next: null, edge: null }] : [];
      for (const [edge, other] of links(node))
        for (const next of chains.get(other) ?? [])
          found.push({ strength: Math.abs(edge.share) * next.strength, node, next, edge });
      found.sort((a, b) => b.strength - a.strength);
      chains.set(node, found.slice(0, k));
    }
    return chains;
  }

  function edgesOf(chain) {
    const edges = [];
    for (let at = chain; at && at.edge; at = at.next) edges.push(at.edge);
    return edges;
  }

  /**
   * The k strongest paths from an input (a token or an error) through `node` to a logit.
   * Returns [{ strength, sign, edges }], strongest first; edges run from the input to the logit.
   */
  function through(scene, node, k = 5) {
    const rank = (i) => scene.nodes[i].row;
    const upward = d3.sort(d3.range(scene.nodes.length), (a, b) => rank(a) - rank(b));
    const isInput = (i) => scene.nodes[i].kind === "token" || scene.nodes[i].kind === "error";
    const below = best(upward, (i) => scene.inputs[i].map((edge) => [edge, edge.source]), (i) => +isInput(i), k);
    const above = best(
      upward.toReversed(), (i) => scene.outputs[i].map((edge) => [edge, edge.target]),
      (i) => scene.nodes[i].probability, k,
    );
    const found = [];
    for (const down of below.get(node) ?? [])
      for (const up of above.get(node) ?? []) {
        const edges = [...edgesOf(down).toReversed(), ...edgesOf(up)];
        found.push({
          strength: down.strength * up.strength,
          sign: edges.reduce((sign, edge) => sign * Math.sign(edge.share), 1),
          edges,
        });
      }
    return d3.sort(found, (path) => -path.strength).slice(0, k);
  }

  return { through };
})();
