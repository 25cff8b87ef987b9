"use strict";
/* The keyboard: everything that a pointer can do. */

fasttc.keys = (() => {
  const { el } = fasttc.base;
  const help = document.getElementById("help");
  let app = null;

  const KEYS = [
    ["← ↑ → ↓", "to the next node in that direction"], ["Enter", "select; Shift Enter adds to the selection"], ["Esc", "clear the selection"],
    ["P", "pin or unpin"], ["G", "group the selection"], ["U", "ungroup"], ["O", "open or close a group"], ["L", "label or rename"],
    ["/", "search; Enter goes to the next hit"], ["1 2 3", "base, fine-tuned, diff"], ["A", "all nodes or the pinned ones"],
    ["Ctrl Z", "undo"], ["Ctrl Shift Z", "redo"], ["+ − 0", "zoom in, out, show everything"], ["?", "these keys"],
    ["Shift drag", "select the nodes in a rectangle"], ["Double click", "open or close a group"],
  ];

  /** The nearest node in a direction: distance ahead counts once, distance aside twice. */
  function neighbour(from, dx, dy) {
    let best = null, least = Infinity;
    for (const node of app.scene.nodes) {
      const x = node.x - from.x, y = node.y - from.y;
      const ahead = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (node === from || ahead < 1 || aside > 4 * ahead) continue;
      if (ahead + 2 * aside < least) [best, least] = [node, ahead + 2 * aside];
    }
    return best;
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function arrow(event) {
    const from = app.scene.byKey.get(app.focusKey) ?? app.scene.nodes[0];
    const next = from && neighbour(from, ...ARROWS[event.key]);
    if (next) fasttc.draw.reveal(next.key);
    event.preventDefault();
  }

  const COMMANDS = {
    p: () => app.togglePins(),
    g: () => (app.selection.size > 1 ? focusOn("group-name") : null),
    u: () => app.ungroupSelected(),
    o: () => app.toggleSelected(),
    l: () => focusOn("label"),
    a: () => app.setScope(app.scope === "all" ? "pinned" : "all"),
    1: () => app.setView("base"), 2: () => app.setView("finetuned"), 3: () => app.setView("diff"),
    "/": () => focusOn("search"),
    "?": () => help.showModal(),
    "+": () => fasttc.draw.zoomBy(1.3), "=": () => fasttc.draw.zoomBy(1.3), "-": () => fasttc.draw.zoomBy(1 / 1.3), 0: () => fasttc.draw.fit(),
    Escape: () => app.clear(),
  };

  function focusOn(id) {
    const field = document.getElementById(id);
    field?.focus();
    field?.select?.();
  }

  function pressed(event) {
    if (help.open) return;
    const typing = event.target.matches("input[type=text], input[type=search], input:not([type])");
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
      event.preventDefault();
      return void (event.shiftKey ? fasttc.state.redo() : fasttc.state.undo());
    }
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onNode = event.target.closest?.("g.node");
    if ((event.key === "Enter" || event.key === " ") && onNode) {
      event.preventDefault();
      return void app.select(app.focusKey, event.shiftKey);
    }
    if (event.key in ARROWS) return void (event.target.matches("input") ? null : arrow(event));
    const command = COMMANDS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (command && !(event.target.matches("input, button, summary") && event.key === "Enter")) {
      event.preventDefault();
      command();
    }
  }

  function start(current) {
    app = current;
    help.append(el("h2", {}, "Keys"), el("dl", {}, ...KEYS.flatMap(([key, what]) => [el("dt", {}, key), el("dd", {}, what)])),
      el("button", { type: "button", onclick: () => help.close() }, "Close"));
    document.getElementById("help-open").addEventListener("click", () => help.showModal());
    document.addEventListener("keydown", pressed);
  }

  return { start };
})();
