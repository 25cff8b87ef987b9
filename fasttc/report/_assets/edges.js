"use strict";
/* Edges on a canvas below the nodes: thousands of curves that must keep up with a finger. */

fasttc.edges = (() => {
  const MOST = 2500; // curves drawn at rest; the strongest are
  const LEVELS = 9; // of width and opacity: curves of one level are one stroke
  const canvas = document.getElementById("edges");
  const context = canvas.getContext("2d");
  let batches = [], accent = [], dim = false;
  let drawnAt = d3.zoomIdentity; // the transform of what is on the canvas

  /** End points of an edge's curve, from the top of the source to the bottom of the target. */
  function ends(scene, edge) {
    const from = scene.nodes[edge.source], to = scene.nodes[edge.target];
    const up = to.y < from.y;
    return { x0: from.x, y0: from.y + (up ? -1 : 1) * from.radius, x1: to.x, y1: to.y + (up ? 1 : -1) * to.radius };
  }

  function trace(path, { x0, y0, x1, y1 }) {
    const middle = (y0 + y1) / 2;
    path.moveTo(x0, y0);
    path.bezierCurveTo(x0, middle, x1, middle, x1, y1);
  }

  /** Strength from 0 to 1 on which width and opacity depend. */
  const strength = (edge, top) => (edge.flow / top) ** 0.45;
  const colourName = (scene, edge) => (scene.diff ? (edge.sign < 0 ? "lost" : "gained") : edge.sign < 0 ? "negative" : "positive");
  const widthOf = (level) => 0.5 + 4 * level ** 2;
  const opacityOf = (level) => 0.05 + 0.65 * level ** 1.4;

  /** Strokes of the whole scene: { path, colour, width, opacity }, weakest first. */
  function compile(scene, skip = null) {
    const drawn = scene.edges.slice(0, MOST).filter((edge) => edge.flow > 0 && !(skip && skip(edge)));
    const top = scene.edges[0]?.flow || 1;
    const found = new Map();
    for (const edge of drawn) {
      const level = Math.max(1, Math.ceil(strength(edge, top) * LEVELS)) / LEVELS;
      const key = level + colourName(scene, edge);
      if (!found.has(key))
        found.set(key, { path: new Path2D(), colour: colourName(scene, edge), width: widthOf(level), opacity: opacityOf(level), level });
      trace(found.get(key).path, ends(scene, edge));
    }
    return d3.sort(found.values(), (batch) => batch.level);
  }

  /** Edges that are brought forward: those of the selected or hovered node, or of a path. */
  function compileAccent(scene, edges) {
    const top = d3.max(edges, (edge) => Math.max(edge.flow, 1e-12)) || 1;
    return d3.sort(edges, (edge) => edge.flow).map((edge) => {
      const path = new Path2D();
      trace(path, ends(scene, edge));
      const level = strength(edge, top);
      return { path, colour: colourName(scene, edge), width: 0.8 + 3.6 * level, opacity: 0.35 + 0.6 * level };
    });
  }

  function update(scene, { skip = null, front = null } = {}) {
    batches = compile(scene, skip);
    highlight(scene, front);
  }

  function highlight(scene, front) {
    dim = front !== null && front.length > 0;
    accent = front ? compileAccent(scene, front) : [];
  }

  function draw(transform, stage, { columns, extent }) {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    drawnAt = transform;
    canvas.style.transform = "";
    const [width, height] = [Math.round(stage.width * ratio), Math.round(stage.height * ratio)];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(ratio * transform.k, 0, 0, ratio * transform.k, ratio * transform.x, ratio * transform.y);
    context.lineCap = "round";
    context.globalAlpha = 1;
    context.fillStyle = fasttc.base.colour("band"); // every other column, behind everything
    columns.forEach(({ left, width: wide }, at) => at % 2 && context.fillRect(left, extent.y0, wide, extent.y1));
    const names = new Set([...batches, ...accent].map((stroke) => stroke.colour));
    const colours = new Map(Array.from(names, (name) => [name, fasttc.base.colour(name)]));
    strokes(batches, dim ? 0.16 : 1, colours, transform.k);
    strokes(accent, 1, colours, transform.k);
  }

  /** Moves what is drawn as a picture, without drawing it anew: for the frames of a gesture. */
  function shift(transform) {
    const k = transform.k / drawnAt.k;
    canvas.style.transform = `translate(${transform.x - k * drawnAt.x}px, ${transform.y - k * drawnAt.y}px) scale(${k})`;
  }

  function strokes(list, opacity, colours, scale) {
    for (const stroke of list) {
      context.globalAlpha = opacity * stroke.opacity;
      context.strokeStyle = colours.get(stroke.colour);
      context.lineWidth = stroke.width / Math.sqrt(scale);
      context.stroke(stroke.path);
    }
  }

  return { update, highlight, draw, shift, ends, MOST, strength, colourName, widthOf, opacityOf };
})();
