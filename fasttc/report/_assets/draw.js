"use strict";
/* The stage: nodes as SVG elements, zoom, drag, lasso, hover. Draws what the scene says and decides nothing. */

fasttc.draw = (() => {
  const { el } = fasttc.base;
  const svg = d3.select("#nodes"), stage = document.getElementById("stage"), tip = document.getElementById("tip");
  const hulls = svg.append("g").attr("class", "hulls");
  const nodeLayer = svg.append("g").attr("class", "nodes"), axis = svg.append("g").attr("class", "axis");
  const lassoBox = svg.append("rect").attr("class", "lasso").attr("hidden", "");
  const symbol = (node) => (node.adapter ? d3.symbolSquare : node.kind === "error" ? d3.symbolDiamond2 : d3.symbolCircle);
  let app = null, transform = d3.zoomIdentity, geometry = null, queued = false, labelScale = 1;

  const size = () => ({ width: stage.clientWidth, height: stage.clientHeight, legend: document.getElementById("legend").offsetHeight });

  /** SVG path of a rectangle around (0, 0) with round corners. */
  function box(width, height, corner) {
    const [w, h] = [width - 2 * corner, height - 2 * corner], arc = (dx, dy) => `a${corner},${corner} 0 0 1 ${dx * corner},${dy * corner}`;
    return `M${-w / 2},${-height / 2}h${w}${arc(1, 1)}v${h}${arc(-1, 1)}h${-w}${arc(-1, -1)}v${-h}${arc(1, -1)}z`;
  }

  /** Shape of a node: its SVG path around (0, 0), and `radius`, half its height. */
  function shape(node, most) {
    if (node.kind === "token" || node.kind === "logit" || node.kind === "group") {
      const height = node.kind === "group" ? 26 : 22;
      const corner = node.kind === "group" ? 9 : 5;
      node.radius = height / 2;
      return box(node.width, height, corner);
    }
    const room = Math.min(geometry.gap / 2 - 1, geometry.line / 2 - 1, 10);
    node.radius = Math.max(Math.min(3.2 + 7 * Math.sqrt(node.influence / most), Math.max(room, 4)), 3);
    if (node.kind === "error") node.radius *= 0.85;
    return d3.symbol(symbol(node), Math.PI * node.radius ** 2)();
  }

  function label(node) {
    const where = { token: "input", logit: "output" }[node.kind] ?? `layer ${node.layer}`;
    const parts = [`${node.adapter ? "adapter " : ""}${node.kind} ${node.name}`, `${where}, position ${node.position}`, `influence ${fasttc.base.percent(node.influence)}`];
    if (node.status) parts.push(node.status);
    if (node.kind === "group") parts.push(`${node.members.length} nodes`);
    return parts.join(", ");
  }

  /** Draws the scene anew: shapes, labels, axis, edges. */
  function update(current) {
    app = current;
    geometry = fasttc.layout.place(app.scene, app, size());
    const { nodes } = app.scene;
    const inner = nodes.filter((node) => node.kind === "feature" || node.kind === "error");
    const most = d3.max(inner, (node) => Math.max(node.influence, node.influenceBefore ?? 0)) || 1;
    nodeLayer.selectAll("g.node").data(nodes, (node) => node.key).join(enter)
      .attr("class", (node) => ["node", node.kind, node.status, node.pinned && "pinned", node.labelled && "labelled",
        node.adapter && "adapter", node.inGroup && "member"].filter(Boolean).join(" "))
      .attr("aria-label", label).attr("data-index", (node) => node.index).attr("data-id", (node) => node.key)
      .order()
      .select("path.shape").attr("d", (node) => shape(node, most));
    place(nodeLayer.selectAll("g.node"));
    drawAxis();
    drawHulls();
    labels();
    document.getElementById("empty").hidden = inner.length > 0 || app.scene.edges.length > 0;
    fasttc.edges.update(app.scene);
    marks();
    if (fitted === null || transform.toString() === fitted) fit(false); // unless the reader has zoomed
  }

  function enter(selection) {
    const node = selection.append("g").attr("role", "button").attr("tabindex", -1);
    node.append("path").attr("class", "halo").attr("d", "M0 0");
    node.append("path").attr("class", "shape");
    node.append("text").attr("class", "name");
    node.append("text").attr("class", "note");
    node.on("click", (event, d) => app.select(d.key, event.shiftKey || event.ctrlKey || event.metaKey))
      .on("dblclick", (event, d) => app.toggleGroup(d))
      .on("focus", (event, d) => app.focus(d.key))
      .on("pointerenter", (event, d) => hover(event, d)).on("pointerleave", () => hover(null, null))
      .call(d3.drag().filter((event) => !event.button && !event.shiftKey && !event.ctrlKey).clickDistance(3)
        .subject((event, d) => ({ x: transform.applyX(d.x), y: transform.applyY(d.y) }))
        .container(() => svg.node())
        .on("start", dragStart).on("drag", dragged).on("end", dragEnd));
    return node;
  }

  const place = (selection) => selection.attr("transform", (node) => `translate(${node.x},${node.y})`);

  // Dragging: the edges of the dragged node are in front and follow; the others stay as they were compiled.
  let dragging = null;

  function dragStart(event, node) {
    dragging = { node, element: d3.select(this), moved: false, edges: [...app.scene.inputs[node.index], ...app.scene.outputs[node.index]] };
    hover(null, null);
  }

  function dragged(event) {
    const { node, element } = dragging;
    if (!dragging.moved) {
      dragging.moved = true;
      const own = new Set(dragging.edges);
      fasttc.edges.update(app.scene, { skip: (edge) => own.has(edge) });
    }
    node.x = transform.invertX(event.x);
    node.y = transform.invertY(event.y);
    place(element);
    fasttc.edges.highlight(app.scene, dragging.edges);
    request();
  }

  function dragEnd() {
    const { node, moved } = dragging;
    dragging = null;
    if (moved) fasttc.state.change((state) => { state.moved[node.key] = [Math.round(node.x - node.homeX), Math.round(node.y - node.homeY)]; });
  }

  function hover(event, node) {
    if (dragging) return;
    app?.hover(node?.key ?? null);
    tip.hidden = node === null;
    if (node === null) return;
    tip.replaceChildren(el("strong", {}, node.name), el("span", {}, label(node).split(", ").slice(1).join(" · ")));
    const box = stage.getBoundingClientRect(), own = event.currentTarget.getBoundingClientRect();
    tip.style.left = `${Math.min(Math.max(own.left - box.left + own.width / 2, 90), box.width - 90)}px`;
    tip.style.top = `${own.top - box.top}px`;
  }

  /** What is selected, found or on a path: classes of the nodes, and the edges in front. */
  function marks() {
    const { scene } = app;
    const front = app.frontEdges();
    const lit = new Set(front?.flatMap((edge) => [edge.source, edge.target]));
    for (const key of app.selection) if (scene.byKey.has(key)) lit.add(scene.byKey.get(key).index);
    const dim = front !== null || app.found !== null;
    nodeLayer.selectAll("g.node")
      .classed("selected", (node) => app.selection.has(node.key))
      .classed("found", (node) => app.found?.has(node.key) ?? false)
      .classed("dim", (node) => dim && !(app.found ? app.found.has(node.key) : lit.has(node.index)))
      .attr("aria-pressed", (node) => app.selection.has(node.key))
      .attr("tabindex", (node) => (node.key === app.focusKey ? 0 : -1))
      .select("path.halo").attr("d", (node) => halo(node));
    if (!scene.byKey.has(app.focusKey)) nodeLayer.select("g.node").attr("tabindex", 0);
    highlight(front);
  }

  function highlight(front) {
    fasttc.edges.highlight(app.scene, front);
    request();
  }

  function halo(node) {
    if (node.width === undefined) return d3.symbol(symbol(node), Math.PI * (node.radius + 4) ** 2)();
    return box(node.width + 6, 2 * node.radius + 6, 9);
  }

  /** Names beside dots where there is room for them at the present scale; inside chips always. */
  function labels() {
    labelScale = transform.k;
    const small = "11px Inter, system-ui, sans-serif", { fit } = fasttc.base;
    const dots = app.scene.nodes.filter((node) => node.kind === "feature" || node.kind === "error");
    for (const line of d3.group(app.scene.nodes, (node) => Math.round(node.y / 7)).values()) {
      const sorted = d3.sort(line, (node) => node.x);
      sorted.forEach((node, at) => {
        const next = sorted[at + 1];
        node.room = next ? (next.x - (next.width ?? 2 * next.radius) / 2 - node.x - node.radius) * labelScale - 8 : 170;
      });
    }
    for (const node of dots) {
      const marked = app.selection.has(node.key) || node.pinned;
      node.above = marked && node.room < 60; // no room beside it
      const roomy = node.labelled ? node.room >= 34 : geometry.gap * labelScale >= 56;
      const wanted = node.kind === "feature" && (marked || roomy);
      node.text = wanted ? fit(node.name, node.above ? 120 : Math.min(node.room, 170), small) : "";
    }
    const scale = Math.max(labelScale, 0.75);
    nodeLayer.selectAll("g.node").each(function (node) {
      const name = this.querySelector(".name"), note = this.querySelector(".note");
      if (node.width === undefined) {
        name.textContent = node.text;
        name.setAttribute("x", node.above ? 0 : node.radius + 4 / scale);
        name.setAttribute("y", node.above ? -node.radius - 11 / scale : 0);
        name.setAttribute("font-size", 11 / scale);
        name.setAttribute("text-anchor", node.above ? "middle" : "start");
        return;
      }
      const extra = node.kind === "logit" ? (app.scene.diff ? fasttc.layout.NOTE.diff : fasttc.layout.NOTE.plain) : node.kind === "group" ? fasttc.layout.NOTE.group : 0;
      name.textContent = fit(node.name, node.width - extra - 10, fasttc.layout.FONT);
      name.setAttribute("x", -extra / 2);
      note.textContent = node.kind === "logit" ? probability(node) : node.kind === "group" ? node.members.length : "";
      note.setAttribute("x", node.width / 2 - 7);
    });
  }

  function probability(node) {
    const { percent } = fasttc.base;
    return app.scene.diff ? `${percent(node.probabilityBefore).replace(" %", "")} → ${percent(node.probability)}` : percent(node.probability);
  }

  function drawAxis() {
    axis.selectAll("text").data(geometry.rows.filter((row) => row?.name)).join("text").text((row) => row.name);
    placeAxis();
  }

  function placeAxis() {
    let last = Infinity;
    axis.selectAll("text").attr("x", 10).attr("y", (row) => transform.applyY(row.top + row.height / 2) + 4)
      .attr("visibility", (row) => {
        const y = transform.applyY(row.top + row.height / 2);
        const free = Math.abs(last - y) >= 12;
        if (free) last = y;
        return free ? null : "hidden";
      });
  }

  /** Outlines of open groups around their members. */
  function drawHulls() {
    const open = d3.groups(app.scene.nodes.filter((node) => node.inGroup), (node) => node.inGroup);
    const hull = hulls.selectAll("g").data(open, ([name]) => name).join((enter) => {
      const group = enter.append("g");
      group.append("path");
      group.append("text");
      return group.on("dblclick", (event, [name]) => app.toggleGroup({ group: name }));
    });
    hull.select("path").attr("d", ([, members]) => {
      const points = members.flatMap((node) => [[-14, -14], [14, -14], [14, 14], [-14, 14]].map(([dx, dy]) => [node.x + dx, node.y + dy]));
      return "M" + d3.polygonHull(points).join("L") + "Z";
    });
    hull.select("text").text(([name]) => fasttc.base.visible(name))
      .attr("x", ([, members]) => d3.mean(members, (node) => node.x)).attr("y", ([, members]) => d3.min(members, (node) => node.y) - 20);
  }

  /** One drawing per frame, however many events ask for it. */
  function request() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      fasttc.edges.draw(transform, size(), geometry);
    });
  }

  const SETTLE = 120; // milliseconds without movement after which a gesture's edges are drawn anew
  let settled = null, fitted = null; // fitted: the transform that shows everything, as text
  const zoom = d3.zoom().scaleExtent([0.1, 12]).filter((event) => !event.shiftKey && (!event.button || event.type === "wheel"))
    .on("zoom", (event) => {
      transform = event.transform;
      for (const group of [hulls, nodeLayer]) group.attr("transform", transform);
      placeAxis();
      fasttc.edges.shift(transform);
      clearTimeout(settled);
      settled = setTimeout(request, SETTLE);
    })
    .on("end", () => {
      request();
      if (app && Math.abs(Math.log(transform.k / labelScale)) > 0.05) labels();
    });

  function fit(animate = true) {
    const { width, height, legend } = size(), { x1, y1 } = geometry.extent;
    const room = height - legend, tall = y1 - legend; // the legend keeps its size
    const k = Math.min(1, width / x1, room / tall);
    const target = d3.zoomIdentity.translate((width - k * x1) / 2, Math.max((room - k * tall) / 2, 0)).scale(k);
    fitted = target.toString();
    const calm = !animate || matchMedia("(prefers-reduced-motion: reduce)").matches;
    (calm ? svg : svg.transition().duration(250)).call(zoom.transform, target);
  }

  function lasso(event) {
    const [x0, y0] = d3.pointer(event.sourceEvent, svg.node());
    const box = { x0, y0, x1: x0, y1: y0 };
    event.on("drag", (move) => {
      [box.x1, box.y1] = d3.pointer(move.sourceEvent, svg.node());
      lassoBox.attr("hidden", null).attr("x", Math.min(box.x0, box.x1)).attr("y", Math.min(box.y0, box.y1))
        .attr("width", Math.abs(box.x1 - box.x0)).attr("height", Math.abs(box.y1 - box.y0));
    }).on("end", () => {
      lassoBox.attr("hidden", "");
      const [left, right] = d3.extent([box.x0, box.x1]).map((x) => transform.invertX(x));
      const [top, bottom] = d3.extent([box.y0, box.y1]).map((y) => transform.invertY(y));
      const inside = app.scene.nodes.filter((node) => node.x >= left && node.x <= right && node.y >= top && node.y <= bottom);
      if (inside.length) app.selectMany(inside.map((node) => node.key));
      else if (left === right) app.clear();
    });
  }

  function start() {
    svg.call(zoom).on("dblclick.zoom", null);
    svg.on("click", (event) => { if (event.target === svg.node()) app.clear(); });
    svg.call(d3.drag().filter((event) => event.shiftKey && !event.target.closest("g.node")).on("start", lasso));
  }

  /** Brings a node into view if it is not, and gives it the keyboard. */
  function reveal(key) {
    const node = app.scene.byKey.get(key);
    if (!node) return;
    const { width, height } = size(), x = transform.applyX(node.x), y = transform.applyY(node.y);
    if (x < 30 || y < 20 || x > width - 30 || y > height - 20) svg.call(zoom.translateTo, node.x, node.y);
    nodeLayer.selectAll("g.node").filter((other) => other.key === key).node()?.focus({ preventScroll: true });
  }

  return {
    start, update, marks, highlight, labels, request, fit, reveal,
    zoomBy: (factor) => svg.call(zoom.scaleBy, factor),
    get transform() { return transform; },
    get geometry() { return geometry; },
  };
})();
