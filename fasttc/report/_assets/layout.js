"use strict";
/* Where nodes stand: layers are rows (tokens below, logits on top), positions of the prompt are columns. */

fasttc.layout = (() => {
  const SMALLEST = 15, WIDEST = 150; // pixels between neighbours of a cell
  const FONT = "12px Inter, system-ui, sans-serif";
  const NOTE = { plain: 40, diff: 82 }; // pixels for the probability in an output's chip
  const MARGIN = { left: 44, right: 60, top: 14, bottom: 14 };

  const units = (node) => (node.kind === "group" ? 4 : 1);
  const chipWidth = (node, most) => Math.min(fasttc.base.width(node.name, FONT) + 16, most);

  /** Nodes of each cell, in the order of their table, so that a node keeps its place from view to view. */
  function cells(nodes) {
    return d3.group(nodes.filter((node) => node.kind !== "token" && node.kind !== "logit"),
      (node) => node.layer, (node) => node.position);
  }

  /** Units that a column needs when a cell may have `lines` lines. */
  function columnUnits(grid, positions, lines) {
    const needed = new Array(positions).fill(1);
    for (const row of grid.values())
      for (const [position, nodes] of row)
        needed[position] = Math.max(needed[position], Math.ceil(d3.sum(nodes, units) / lines));
    return needed;
  }

  /** Column widths: the widest gap between neighbours with which everything fits, if any does. */
  function columnWidths(needed, tokens, room) {
    const width = (gap) => needed.map((count, at) => Math.max(count * gap, tokens[at]));
    let gap = WIDEST;
    while (gap > SMALLEST && d3.sum(width(gap)) > room) gap = Math.max(gap * 0.95, SMALLEST);
    return { gap, widths: width(gap) };
  }

  /** Places one cell's nodes in lines around the middle of its column. */
  function placeCell(nodes, left, width, gap) {
    const perLine = Math.max(1, Math.floor(width / gap + 1e-6));
    const lines = [[]];
    let used = 0;
    for (const node of nodes) {
      if (used && used + units(node) > perLine) {
        lines.push([]);
        used = 0;
      }
      lines.at(-1).push(node);
      used += units(node);
    }
    for (const [line, members] of lines.entries()) {
      let x = left + (width - d3.sum(members, units) * gap) / 2;
      for (const node of members) {
        node.x = x + (units(node) * gap) / 2;
        node.line = line;
        x += units(node) * gap;
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
      needed = columnUnits(grid, positions, lines);
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
    const logitLines = placeLogits(nodes.filter((node) => node.kind === "logit"), MARGIN.left, right, scene.diff ? NOTE.diff : NOTE.plain);
    return placeRows(nodes, lines, logitLines, stage, { columns, right, gap: fitted.gap, state: app.state });
  }

  /** Row heights from the number of lines in each, and with them every y. */
  function placeRows(nodes, lines, logitLines, stage, geometry) {
    const EMPTY = 0.3, PAD = 0.45; // of a line
    const height = lines.map((count) => (count ? count + PAD : EMPTY));
    const fixed = MARGIN.top + MARGIN.bottom + stage.legend + 30 * logitLines + 40;
    const line = Math.min(Math.max((stage.height - fixed) / Math.max(d3.sum(height), 1), 14), 220);
    const rows = [];
    let y = MARGIN.top;
    rows.push({ layer: lines.length, top: y, height: 30 * logitLines + 8, first: y + 15, line: 30, name: "out" });
    y += 30 * logitLines + 8;
    for (let layer = lines.length - 1; layer >= 0; layer--) {
      const tall = height[layer] * line;
      rows[lines.length - layer] = {
        layer, top: y, height: tall, first: y + (tall - (Math.max(lines[layer], 1) - 1) * line) / 2, line, name: lines[layer] ? "L" + layer : "",
      };
      y += tall;
    }
    rows.push({ layer: -1, top: y, height: 32, first: y + 18, line: 0, name: "in" });
    for (const node of nodes) {
      const row = rows[lines.length - node.layer];
      node.y = row.first + node.line * row.line;
      const moved = geometry.state.moved[node.key];
      node.homeX = node.x;
      node.homeY = node.y;
      if (moved) [node.x, node.y] = [node.x + moved[0], node.y + moved[1]];
    }
    const extent = { x0: 0, y0: 0, x1: geometry.right + MARGIN.right, y1: y + 32 + MARGIN.bottom + stage.legend };
    return { ...geometry, rows, extent, line };
  }

  return { place, FONT, NOTE };
})();
