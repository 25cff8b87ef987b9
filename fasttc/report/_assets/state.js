"use strict";
/* What the reader makes of a graph: groups, labels, pins, moved nodes. Every change can be undone and is saved. */

fasttc.state = (() => {
  const SCHEMA = "fasttc.supernodes/1";
  const EMPTY = { groups: [], labels: {}, pinned: [], moved: {}, open: [] };
  const listeners = d3.dispatch("change", "saved");
  let current = structuredClone(EMPTY);
  let past = [], future = [];
  let settings = {}; // sliders and view: saved with the rest, not part of the history
  let save = () => {};

  const isStrings = (value) => Array.isArray(value) && value.every((entry) => typeof entry === "string");

  /** State from the content of a supernode file; throws with one line on what is wrong. */
  function parse(content) {
    if (content?.schema !== SCHEMA) throw new Error(`expected schema ${SCHEMA}, got ${content?.schema}`);
    const { groups = [], labels = {}, pinned = [] } = content, page = content.page ?? {};
    for (const group of groups)
      if (typeof group?.name !== "string" || !group.name.trim() || !isStrings(group.members) || !group.members.length)
        throw new Error("expected groups with a name and members");
    if (new Set(groups.map((group) => group.name)).size < groups.length) throw new Error("expected every name once");
    const members = groups.flatMap((group) => group.members);
    if (new Set(members).size < members.length) throw new Error("expected every node in one group");
    if (!isStrings(pinned) || !isStrings(Object.values(labels))) throw new Error("expected labels and ids as text");
    const moved = {}, open = isStrings(page.open) ? [...page.open] : []; // only how it looks: what is broken is left out
    for (const [id, at] of Object.entries(page.moved ?? {})) if (at?.length === 2 && at.every(Number.isFinite)) moved[id] = at;
    return { groups: structuredClone(groups), labels: { ...labels }, pinned: [...new Set(pinned)], moved, open };
  }

  /** The content of a supernode file. */
  function content() {
    const { groups, labels, pinned, moved, open } = current;
    return { schema: SCHEMA, groups, labels, pinned, page: { moved, open, ...settings } };
  }

  /** Replaces the state by what `edit` makes of a copy of it. */
  function change(edit) {
    const next = structuredClone(current);
    edit(next);
    if (JSON.stringify(next) === JSON.stringify(current)) return;
    past.push(current);
    future = [];
    set(next);
  }

  function set(next) {
    current = next;
    listeners.call("change");
    schedule();
  }

  function undo() {
    if (!past.length) return;
    future.push(current);
    set(past.pop());
  }

  function redo() {
    if (!future.length) return;
    past.push(current);
    set(future.pop());
  }

  /** A name that no other group has. */
  function freeName(state, wanted, but = null) {
    const base = wanted.trim() || "group";
    let name = base;
    for (let copy = 2; state.groups.some((group) => group !== but && group.name === name); copy++) name = `${base} (${copy})`;
    return name;
  }

  /** Ids of all members of a group, also of those that are not shown. */
  const members = (name) => current.groups.find((group) => group.name === name).members;

  /** Makes one group of nodes; those that were in other groups leave them. Returns its name. */
  function group(ids, name) {
    let made = null;
    change((state) => {
      made = freeName(state, name);
      const taken = new Set(ids);
      for (const other of state.groups) other.members = other.members.filter((id) => !taken.has(id));
      state.groups = state.groups.filter((other) => other.members.length);
      state.groups.push({ name: made, members: [...taken] });
    });
    return made;
  }

  function ungroup(name) {
    change((state) => {
      state.groups = state.groups.filter((group) => group.name !== name);
      delete state.moved["group:" + name];
    });
  }

  function renameGroup(name, wanted) {
    let made = name;
    change((state) => {
      const group = state.groups.find((one) => one.name === name);
      if (!wanted.trim()) return;
      made = group.name = freeName(state, wanted, group);
      state.open = state.open.map((one) => (one === name ? made : one));
      if (state.moved["group:" + name]) {
        state.moved["group:" + made] = state.moved["group:" + name];
        if (made !== name) delete state.moved["group:" + name];
      }
    });
    return made;
  }

  function label(id, text) {
    change((state) => {
      if (text.trim()) state.labels[id] = text.trim();
      else delete state.labels[id];
    });
  }

  function togglePins(ids) {
    change((state) => {
      const all = ids.every((id) => state.pinned.includes(id));
      state.pinned = all ? state.pinned.filter((id) => !ids.includes(id)) : [...new Set([...state.pinned, ...ids])];
    });
  }

  let timer = null;
  function schedule() {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      timer = null;
      try {
        listeners.call("saved", null, await save(JSON.stringify(content())));
      } catch (error) {
        listeners.call("saved", null, `Not saved: ${error.message}`);
      }
    }, 250);
  }

  /** Starts from saved content, with others to undo to; `store(text)` saves and returns what to tell the reader. */
  function start(saved, store, others = []) {
    save = store;
    past = others.map(parse);
    if (saved) current = parse(saved);
    settings = saved?.page ? { view: saved.page.view, shares: saved.page.shares, hidden: saved.page.hidden } : {};
  }

  function keep(changes) {
    settings = { ...settings, ...changes };
    schedule();
  }

  return {
    change, content, freeName, group, keep, label, listeners, members, parse, redo, renameGroup, set: (next) => change((state) => Object.assign(state, next)),
    start, togglePins, undo, ungroup,
    get current() { return current; },
    get settings() { return settings; },
    get canUndo() { return past.length > 0; },
    get canRedo() { return future.length > 0; },
    get pending() { return timer !== null; },
  };
})();
