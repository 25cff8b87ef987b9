"use strict";
/* Where nodes stand: layers are rows (tokens below, logits on top), positions of the prompt are columns. */

fasttc.layout = (() => {
  const SMALLEST = 15, WIDEST = 150; // pixels between neighbours of a cell
  const FONT = "12px Inter, system-ui, sans-serif";
  const NOTE = { plain: 40, diff: 82, group: 24 }; // pixels for the probability in an output's chip, members in a group's
  const WIDEST_GROUP = 210;
  const MARGIN = { left: 44, right: 60, top: 14, bottom: 14 };

  const LINE = 30, APART = 8; // pixels from one line of chips to the next, and between neighbours
  const SLACK = 24; // pixels that a group may be moved to the right before it gets a line of its own

  const chipWidth = (node, most) => Math.min(fasttc.base.width(node.name, FONT) + 16, most);

  /** Dots of each cell, in the order of their table, so that a node keeps its place from view to view. */
  function cells(nodes) {
    return d3.group(nodes.filter((node) => node.kind === "feature" || node.kind === "error"),
      (node) => node.layer, (node) => node.position);
  }

  /** Dots side by side that a column needs when a cell may have `lines` lines. */
  function columnCounts(grid, positions, lines) {
    const needed = new Array(positions).fill(1);
    for (const row of grid.values())
      for (const [position, nodes] of row)
        needed[position] = Math.max(needed[position], Math.ceil(nodes.length / lines));
    return needed;
  }

  /** Column widths: the widest gap between neighbours with which everything fits, if any does. */
  function columnWidths(needed, tokens, room) {
    const width = (gap) => needed.map((count, at) => Math.max(count * gap, tokens[at]));
    let gap = WIDEST;
    while (gap > SMALLEST && d3.sum(width(gap)) > room) gap = Math.max(gap * 0.95, SMALLEST);
    return { gap, widths: width(gap) };
  }

  /** Places one cell's dots in lines around the middle of its column. */
  function placeCell(nodes, left, width, gap) {
    const perLine = Math.max(1, Math.floor(width / gap + 1e-6));
    for (const [at, node] of nodes.entries()) {
      const line = Math.floor(at / perLine), among = Math.min(perLine, nodes.length - line * perLine);
      node.line = line;
      node.x = left + width / 2 + ((at % perLine) - (among - 1) / 2) * gap;
    }
    return Math.ceil(nodes.length / perLine);
  }

  /** Places the groups of a row near their columns, in as many lines as keep them from covering one another. */
  function placeGroups(groups, columns, [left, right], first) {
    const lines = [];
    const middle = (node) => columns[node.position].left + columns[node.position].width / 2;
    for (const node of d3.sort(groups, middle)) {
      const wanted = Math.max(Math.min(middle(node) - node.width / 2, right - node.width), left);
      let line = lines.find(({ end }) => end + APART <= wanted + SLACK);
      if (!line) lines.push((line = { members: [], end: -Infinity, number: first + lines.length }));
      node.x = Math.max(wanted, line.end + APART) + node.width / 2;
      node.line = line.number;
      line.end = node.x + node.width / 2;
      line.members.push(node);
    }
    for (const { members } of lines) {
      let end = right;
      for (const node of members.reverse()) {
        node.x = Math.min(node.x, end - node.width / 2);
        end = node.x - node.width / 2 - APART;
      }
    }
    return lines.length;
  }

  /** Logit chips in rows from the right, the most probable first from the left within a row. */
  function placeLogits(logits, left, right, note) {
    const lines = [[]];
    let used = 0;
    for (const node of d3.sort(logits, (node) => -Math.max(node.probability, node.probabilityBefore ?? 0))) {
      node.width = chipWidth(node, 120) + note;
      if (used && used + node.width + 6 > right - left) {
        lines.push([]);
        used = 0;
      }
      lines.at(-1).push(node);
      used += node.width + 6;
    }
    for (const [line, members] of lines.entries()) {
      let x = right - d3.sum(members, (node) => node.width + 6) + 6;
      for (const node of members) {
        node.x = x + node.width / 2;
        node.line = line;
        x += node.width + 6;
      }
    }
    return lines.length;
  }

  /** Sets x, y of every node; returns the geometry of rows and columns. */
  function place(scene, app, stage) {
    const { nodes } = scene, positions = app.data.tokens.length, layers = app.data.layers;
    const grid = cells(nodes);
    const tokens = nodes.filter((node) => node.kind === "token");
    const room = Math.max(stage.width - MARGIN.left - MARGIN.right, 200);
    const least = new Array(positions).fill(12);
    const most = Math.max(28, Math.min(110, (1.6 * room) / positions));
    for (const node of tokens) least[node.position] = chipWidth(node, most) + 6;

    let needed, fitted;
    for (let lines = 1; lines <= 8; lines++) {
      needed = columnCounts(grid, positions, lines);
      fitted = columnWidths(needed, least, room);
      if (fitted.gap >= 26 && d3.sum(fitted.widths) <= room) break;
    }
    const spare = Math.max(room - d3.sum(fitted.widths), 0) / positions;
    const columns = [];
    let x = MARGIN.left;
    for (const width of fitted.widths) {
      columns.push({ left: x, width: width + spare });
      x += width + spare;
    }
    const right = x;
    for (const node of tokens) {
      const column = columns[node.position];
      node.x = column.left + column.width / 2;
      node.width = Math.min(chipWidth(node, most), column.width - 4);
      node.line = 0;
    }

    const lines = new Array(layers).fill(0);
    for (const [layer, row] of grid)
      for (const [position, members] of row) {
        const column = columns[position];
        lines[layer] = Math.max(lines[layer], placeCell(members, column.left, column.width, fitted.gap));
      }
    const chips = {
      out: placeLogits(nodes.filter((node) => node.kind === "logit"), MARGIN.left, right, scene.diff ? NOTE.diff : NOTE.plain),
      in: tokens.length ? 1 : 0,
    };
    const grouped = d3.group(nodes.filter((node) => node.kind === "group"), (node) => node.layer);
    for (const [layer, groups] of grouped) {
      for (const node of groups) node.width = Math.min(fasttc.base.width(node.name, FONT) + NOTE.group + 20, WIDEST_GROUP);
      const first = layer < 0 ? chips.in : layer < layers ? lines[layer] : chips.out;
      const more = placeGroups(groups, columns, [MARGIN.left, right], first);
      if (layer < 0) chips.in += more;
      else if (layer < layers) lines[layer] += more;
      else chips.out += more;
    }
    return placeRows(nodes, lines, chips, stage, { columns, right, gap: fitted.gap, state: app.state, least: grouped.size ? LINE : 14 });
  }

  /** Row heights from the number of lines in each, and with them every y. */
  function placeRows(nodes, lines, chips, stage, geometry) {
    const EMPTY = 0.3, PAD = 0.45; // of a line
    const height = lines.map((count) => (count ? count + PAD : EMPTY));
    const inputs = LINE * Math.max(chips.in, 1) + 2;
    const fixed = MARGIN.top + MARGIN.bottom + stage.legend + LINE * chips.out + 8 + inputs;
    const line = Math.min(Math.max((stage.height - fixed) / Math.max(d3.sum(height), 1), geometry.least), 220);
    const rows = [];
    let y = MARGIN.top;
    rows.push({ layer: lines.length, top: y, height: LINE * chips.out + 8, first: y + 15, line: LINE, name: "out" });
    y += LINE * chips.out + 8;
    for (let layer = lines.length - 1; layer >= 0; layer--) {
      const tall = height[layer] * line;
      rows[lines.length - layer] = {
        layer, top: y, height: tall, first: y + (tall - (Math.max(lines[layer], 1) - 1) * line) / 2, line, name: lines[layer] ? "L" + layer : "",
      };
      y += tall;
    }
    rows.push({ layer: -1, top: y, height: inputs, first: y + 18, line: LINE, name: "in" });
    for (const node of nodes) {
      const row = rows[lines.length - node.layer];
      node.y = row.first + node.line * row.line;
      const moved = geometry.state.moved[node.key];
      node.homeX = node.x;
      node.homeY = node.y;
      if (moved) [node.x, node.y] = [node.x + moved[0], node.y + moved[1]];
    }
    const extent = { x0: 0, y0: 0, x1: geometry.right + MARGIN.right, y1: y + inputs + MARGIN.bottom + stage.legend };
    return { ...geometry, rows, extent, line };
  }

  return { place, FONT, NOTE };
})();
