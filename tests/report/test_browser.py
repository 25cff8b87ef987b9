"""The page in a real browser: what a reader does, what is saved, and what hostile data cannot do."""

import base64
import json
import os
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttc.benchmarks.browser import complaints, ready
from fasttc.benchmarks.page import random_graph, whole
from fasttc.graph import Graph, Supernodes, diff
from fasttc.report import FeatureFolder, PageServer, page_data, write_page

from .conftest import HOSTILE

PICTURES = os.environ.get("FASTTC_PICTURES")  # a folder: screenshots of what was tested are kept there


@pytest.fixture
def show(driver: Any, serve: Callable[..., PageServer], tmp_path: Path) -> Callable[..., PageServer]:
    """Serves a graph and opens its page; the state file is ``tmp_path/g.supernodes.json``."""

    def open_page(graph: Graph, **options: Any) -> PageServer:
        data = options.pop("data", None) or page_data(graph, base=options.pop("base", None), name="g")
        server = serve(data, state_file=tmp_path / "g.supernodes.json", **options)
        driver.get_log("browser")
        driver.get(server.url)
        ready(driver)
        return server

    return open_page


def js(driver: Any, script: str, *arguments: Any) -> Any:
    return driver.execute_script(script, *arguments)


def element(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def texts(driver: Any, selector: str) -> list[str]:
    return js(
        driver, "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def click_node(driver: Any, key: str, shift: bool = False) -> None:
    """A real click of the pointer on a node."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    node = js(
        driver, "return document.querySelector(`g.node[data-id=${CSS.escape(arguments[0])}] .shape`)", key
    )
    actions = ActionChains(driver, duration=0)
    if shift:
        actions = actions.key_down(Keys.SHIFT)
    actions = actions.move_to_element(node).click()
    (actions.key_up(Keys.SHIFT) if shift else actions).perform()


def features(driver: Any, count: int = 3) -> list[str]:
    """Keys of the most influential features in the scene."""
    script = (
        "return d3.sort(fasttc.app.scene.nodes.filter((n) => n.kind === 'feature'), (n) => -n.influence)"
        ".slice(0, arguments[0]).map((n) => n.key)"
    )
    return js(driver, script, count)


def type_into(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element(driver, selector).send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text, Keys.ENTER)


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver, duration=0).send_keys(*keys).perform()


def chord(driver: Any, modifier: str, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver, duration=0).key_down(modifier).send_keys(key).key_up(modifier).perform()


def saved(driver: Any, server: PageServer) -> dict[str, Any]:
    """The state file once the page has saved everything."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not js(driver, "return fasttc.state.pending") and server.state_file.exists():
            content = json.loads(server.state_file.read_text())
            if content["labels"] == js(driver, "return fasttc.state.current.labels") and [
                group["name"] for group in content["groups"]
            ] == js(driver, "return fasttc.state.current.groups.map((g) => g.name)"):
                return content
        time.sleep(0.02)
    raise AssertionError("the page did not save its state in 5 s")


def picture(driver: Any, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


# --- the numbers -----------------------------------------------------------------------------------------------


def assert_prunes_alike(driver: Any, graph: Graph, node_share: float, edge_share: float) -> None:
    script = """
    const graph = fasttc.app.graphs[0], pruned = fasttc.graph.prune(graph, arguments[0], arguments[1]);
    const kept = fasttc.graph.prunedScores(graph, pruned);
    return [Array.from(pruned.nodes), Array.from(pruned.edges), Array.from(graph.influence),
            [kept.replacement, kept.completeness, kept.completeness_rows]];
    """
    nodes, edges, influence, scores = js(driver, script, node_share, edge_share)
    expected = graph.prune(node_share, edge_share)
    assert nodes == expected.node_mask.int().tolist()
    assert edges == expected.edge_mask.int().tolist()
    # Both add in float64 and nearly in the same order: what is left is rounding of sums of at most n terms.
    room = graph.n_nodes * torch.finfo(torch.float64).eps
    assert torch.tensor(influence, dtype=torch.float64).sub(expected.influence).abs().max() <= room
    assert scores == pytest.approx(list(expected.scores()), rel=0, abs=room)


@pytest.mark.parametrize(
    ("node_share", "edge_share"), [(0.8, 0.98), (0.3, 0.6), (0.95, 0.999), (1.0, 1.0), (0.0, 0.0)]
)
def test_pruning_is_that_of_python(driver, show, small, node_share, edge_share):
    show(small)
    assert_prunes_alike(driver, small, node_share, edge_share)


def test_pruning_of_a_part_counts_what_is_missing(driver, show, small):
    part = small.prune(0.9, 0.9).subgraph()
    assert bool((part.remainder > 0).any())
    show(part)
    assert_prunes_alike(driver, part, 0.8, 0.95)


def test_pruning_of_a_graph_of_real_size(driver, show):
    graph = random_graph(500, layers=6, tokens=14, inputs=110)
    assert graph.n_edges > 40_000
    show(graph)
    assert_prunes_alike(driver, graph, 0.8, 0.98)
    shown = json.loads(element(driver, "#scores").get_attribute("data-kept"))
    expected = graph.prune()
    assert (shown["nodes"], shown["edges"]) == (expected.n_nodes, expected.n_edges)
    assert shown["completeness"] == pytest.approx(expected.scores().completeness)


def test_pruning_of_circuit_tracers_graphs(driver, show, shared_data):
    from safetensors.torch import load_file

    tensors = load_file(shared_data / "oracle" / "gemma2_jumprelu" / "ct_graph_f64.safetensors")
    graph = Graph.from_dense(
        tensors["adjacency"],
        features=tensors["active_features"],
        activations=tensors["activation_values"],
        input_ids=tensors["input_tokens"],
        logit_ids=tensors["logit_token_ids"],
        logit_probs=tensors["logit_probabilities"],
    )
    show(graph)
    for shares in ((0.8, 0.98), (0.6, 0.9)):
        assert_prunes_alike(driver, graph, *shares)


def test_paths_are_the_strongest_there_are(driver, show, small):
    show(small)
    js(driver, "fasttc.app.setShares([1, 1])")
    key = features(driver, 1)[0]
    script = """
    const scene = fasttc.app.scene, node = scene.byKey.get(arguments[0]);
    return [fasttc.paths.through(scene, node.index, 5).map((p) => p.strength), node.index,
            scene.edges.map((e) => [e.source, e.target, e.share]), scene.nodes.map((n) => [n.kind, n.probability])];
    """
    found, through, edges, nodes = js(driver, script, key)
    outputs: dict[int, list[tuple[int, float]]] = {}
    inputs: dict[int, list[tuple[int, float]]] = {}
    for source, target, share in edges:
        outputs.setdefault(source, []).append((target, abs(share)))
        inputs.setdefault(target, []).append((source, abs(share)))

    def ends(at: int, links: dict, worth: Callable[[int], float]) -> list[float]:
        own = [worth(at)] if worth(at) else []
        return own + [
            share * rest for other, share in links.get(at, []) for rest in ends(other, links, worth)
        ]

    below = ends(through, inputs, lambda at: float(nodes[at][0] in ("token", "error")))
    above = ends(through, outputs, lambda at: nodes[at][1])
    every = sorted((a * b for a in sorted(below)[-5:] for b in sorted(above)[-5:]), reverse=True)
    assert found == pytest.approx(every[:5], rel=1e-12)


def test_a_groups_edges_follow_the_frontends_rule(driver, show, small):
    """methods 6.6: outside fractions of the members, links within a group dropped."""
    show(small)
    js(driver, "fasttc.app.setShares([1, 1]); fasttc.state.group(arguments[0], 'both')", features(driver, 3))
    script = """
    const scene = fasttc.app.scene, table = fasttc.app.table, group = scene.byKey.get('group:both');
    return [group.members.map((row) => table.id[row]),
            scene.inputs[group.index].map((e) => [scene.nodes[e.source].key, e.share, e.weight])];
    """
    members, edges = js(driver, script)
    from fasttc.graph import node_ids

    ids = node_ids(small)
    own = [ids.index(member) for member in members]
    dense = small.dense().double()
    outside = dense.abs()[own].sum(1) - dense.abs()[own][:, own].sum(1)
    fraction = outside / dense.abs()[own].sum(1)
    fraction /= fraction.sum()
    assert len(edges) > 5
    for key, share, weight in edges:
        links = dense[own, ids.index(key)]
        assert share == pytest.approx(float((fraction * links / outside).sum()), rel=1e-9)
        assert weight == pytest.approx(float(links.sum()), rel=1e-9)


# --- the reader ------------------------------------------------------------------------------------------------


def test_opens_without_complaints_and_shows_everything_kept(driver, show, small):
    show(small)
    pruned = small.prune()
    assert len(texts(driver, "g.node")) == pruned.n_nodes
    assert driver.title == small.prompt
    assert texts(driver, "g.node.token .name") == [token.strip() for token in small.tokens]
    assert f"{pruned.n_features}" in element(driver, "#scores").text
    assert complaints(driver) == []
    picture(driver, "small")


def test_click_label_group_rename_undo_reload(driver, show, small):
    from selenium.webdriver.common.keys import Keys

    server = show(small)
    first, second, third = features(driver)
    click_node(driver, first)
    assert texts(driver, "#selection h3")[:2][0].startswith("Strongest inputs")
    type_into(driver, "#label", "hip findings")
    assert js(driver, "return fasttc.app.scene.byKey.get(arguments[0]).name", first) == "hip findings"

    element(driver, "#pin").click()
    click_node(driver, second)
    click_node(driver, third, shift=True)
    press(driver, "g")
    type_into(driver, "#group-name", "say a drug")
    assert texts(driver, "g.node.group .name") == ["say a drug"]
    type_into(driver, "#label", "bonitis")
    assert texts(driver, "g.node.group .name") == ["bonitis"]
    element(driver, "#undo").click()
    assert texts(driver, "g.node.group .name") == ["say a drug"]
    element(driver, "#redo").click()

    content = saved(driver, server)
    kept = Supernodes.load(server.state_file)
    assert set(kept.groups) == {"bonitis"}
    assert set(kept.groups["bonitis"]) == {second, third}
    assert kept.labels == {first: "hip findings"}
    assert kept.pinned == (first,)
    assert content["page"]["moved"] == {}

    driver.refresh()
    ready(driver)
    assert texts(driver, "g.node.group .name") == ["bonitis"]
    assert js(driver, "return fasttc.app.scene.byKey.get(arguments[0]).name", first) == "hip findings"
    assert "pinned" in js(driver, "return document.querySelector('g.node.pinned').getAttribute('class')")
    click_node(driver, "group:bonitis")
    press(driver, "u")
    assert texts(driver, "g.node.group") == []
    chord(driver, Keys.CONTROL, "z")
    assert texts(driver, "g.node.group .name") == ["bonitis"]
    assert complaints(driver) == []


def test_moved_nodes_stay_where_they_were_put(driver, show, small):
    from selenium.webdriver import ActionChains

    server = show(small)
    key = features(driver, 1)[0]
    place = "const n = fasttc.app.scene.byKey.get(arguments[0]); return [n.x, n.y]"
    x, y = js(driver, place, key)
    node = js(
        driver, "return document.querySelector(`g.node[data-id=${CSS.escape(arguments[0])}] .shape`)", key
    )
    ActionChains(driver, duration=0).click_and_hold(node).move_by_offset(40, 25).move_by_offset(
        5, 5
    ).release().perform()
    moved = saved(driver, server)["page"]["moved"][key]
    scale = js(driver, "return fasttc.draw.transform.k")
    assert moved == pytest.approx([45 / scale, 30 / scale], abs=1.5)
    driver.refresh()
    ready(driver)
    assert js(driver, place, key) == pytest.approx([x + moved[0], y + moved[1]], abs=0.01)


def test_the_keyboard_does_what_the_pointer_does(driver, show, small):
    from selenium.webdriver.common.keys import Keys

    show(small)
    (start,) = features(driver, 1)
    js(driver, "fasttc.draw.reveal(arguments[0])", start)
    press(driver, Keys.ENTER)
    assert js(driver, "return [...fasttc.app.selection]") == [start]
    place = "const n = fasttc.app.scene.byKey.get(fasttc.app.focusKey); return [n.x, n.y]"
    for key, axis, sign in ((Keys.ARROW_UP, 1, -1), (Keys.ARROW_DOWN, 1, 1), (Keys.ARROW_LEFT, 0, -1)):
        before = js(driver, place)
        press(driver, key)
        assert sign * (js(driver, place)[axis] - before[axis]) > 0
    chord(driver, Keys.SHIFT, Keys.ENTER)
    assert len(js(driver, "return [...fasttc.app.selection]")) == 2
    press(driver, "p")
    assert len(js(driver, "return fasttc.state.current.pinned")) == 2
    press(driver, "a")
    assert len(texts(driver, "g.node")) == 2
    press(driver, "a", Keys.ESCAPE)
    assert js(driver, "return fasttc.app.selection.size") == 0
    press(driver, "/")
    assert js(driver, "return document.activeElement.id") == "search"
    type_into(driver, "#search", "output1")
    assert js(driver, "return fasttc.app.scene.byKey.get([...fasttc.app.selection][0]).name") == "output1"
    press(driver, Keys.ESCAPE, "?")
    assert js(driver, "return document.getElementById('help').open")
    press(driver, Keys.ESCAPE)
    labels = js(
        driver, "return [...document.querySelectorAll('g.node')].map((n) => n.getAttribute('aria-label'))"
    )
    assert all(labels)
    assert js(driver, "return document.querySelectorAll('g.node[tabindex=\"0\"]').length") == 1


def test_evidence_of_a_feature_comes_from_its_file(driver, show, small, write_features):
    pairs = sorted({(layer, index) for layer, _, index in small.features.tolist()})
    show(small, features=FeatureFolder(write_features(pairs, text=HOSTILE[1])))
    click_node(driver, features(driver, 1)[0])
    deadline = time.monotonic() + 5
    while not texts(driver, ".evidence") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert texts(driver, ".logits.up code") == [HOSTILE[1], "hip"]
    assert len(texts(driver, ".example")) == 7
    assert js(driver, "return document.querySelectorAll('img').length") == 0
    assert complaints(driver) == []
    picture(driver, "evidence")


def test_views_of_two_graphs(driver, show, small, tuned):
    show(tuned, base=small)
    counts = {}
    for view in ("base", "finetuned", "diff"):
        js(driver, "document.querySelector(`#views input[value=${arguments[0]}]`).click()", view)
        counts[view] = set(js(driver, "return fasttc.app.scene.nodes.map((n) => n.key)"))
    assert counts["diff"] == counts["base"] | counts["finetuned"]
    found = diff(small, tuned.prune(0.8, 0.98))
    expected = {change.key[0]: (change.status, change.base, change.tuned) for change in found.nodes}
    js(driver, "fasttc.app.setShares([0.8, 0.98])")
    shown = js(driver, "return fasttc.app.scene.nodes.map((n) => [n.key, n.status, n.shareBefore, n.share])")
    assert {key for key, *_ in shown} >= set(expected)
    assert {"lost", "strengthened", "weakened", "kept"} <= {status for status, *_ in expected.values()}
    for key, status, before, now in shown:
        if key in expected:
            assert status == expected[key][0]
            assert (before, now) == pytest.approx(expected[key][1:], abs=1e-9)
    change = js(
        driver, "return fasttc.app.scene.edges.map((e) => [e.change, Math.abs(e.share) - Math.abs(e.before)])"
    )
    assert all(a == pytest.approx(b) for a, b in change)
    picture(driver, "diff")


def test_exports_and_reads_back(driver, show, small):
    server = show(small)
    keys = features(driver)
    js(
        driver,
        "fasttc.state.group(arguments[0], 'a < b & c'); fasttc.state.label(arguments[1], 'x')",
        keys[:2],
        keys[2],
    )
    for name in ("svg", "png", "state"):
        element(driver, "#export summary").click()
        element(driver, f"#export-{name}").click()
    wanted = [driver.downloads / f"g.{ending}" for ending in ("svg", "png", "supernodes.json")]
    deadline = time.monotonic() + 10
    while not all(path.exists() for path in wanted) and time.monotonic() < deadline:
        time.sleep(0.05)
    svg, png, state = (path.read_bytes() for path in wanted)
    for path in wanted:
        path.unlink()
    root = ET.fromstring(svg)
    shown = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b & c" in shown
    assert {token.strip() for token in small.tokens} <= set(shown)
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") == 2 * int(float(root.get("width") or 0))
    kept = Supernodes.from_dict(json.loads(state))
    assert kept.groups["a < b & c"] == tuple(keys[:2])
    saved(driver, server)

    js(driver, "fasttc.state.ungroup('a < b & c')")
    path = driver.downloads / "back.json"
    Supernodes(groups={"again": tuple(keys)}, pinned=("unknown",)).save(path)
    element(driver, "#state-file").send_keys(str(path))
    deadline = time.monotonic() + 5
    while texts(driver, "g.node.group .name") != ["again"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert texts(driver, "g.node.group .name") == ["again"]
    path.write_text("{}")
    element(driver, "#state-file").send_keys(str(path))
    deadline, said = time.monotonic() + 5, ""
    while "Not read" not in said and time.monotonic() < deadline:
        said = element(driver, "#saved").text
    assert said.startswith("Not read: expected schema")
    assert texts(driver, "g.node.group .name") == ["again"]


# --- hostile data ----------------------------------------------------------------------------------------------


def test_hostile_tokens_labels_and_names_stay_text(driver, show, hostile):
    server = show(hostile)
    elements = js(driver, "return document.querySelectorAll('script, img, iframe, object, embed').length")
    first, second, third = features(driver)
    click_node(driver, first)
    for text in HOSTILE[:3]:
        type_into(driver, "#label", text)
        assert js(driver, "return fasttc.app.scene.byKey.get(arguments[0]).name", first) == text
    js(driver, "fasttc.state.group(arguments[0], arguments[1])", [second, third], HOSTILE[1])
    js(
        driver,
        "fasttc.app.select('group:' + arguments[0]); fasttc.app.toggleGroup({group: arguments[0]})",
        HOSTILE[1],
    )
    js(driver, "fasttc.app.setFound(fasttc.app.scene.nodes)")
    saved(driver, server)
    driver.refresh()
    ready(driver)
    svg = js(driver, "return fasttc.export.markup(fasttc.app)")
    ET.fromstring(svg)  # well-formed whatever the strings are
    data = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    assert (
        js(driver, "return document.querySelectorAll('script, img, iframe, object, embed').length")
        == elements
    )
    assert js(driver, "return window.pwned ?? null") is None
    assert HOSTILE[0] in texts(driver, "#prompt")[0]
    assert complaints(driver) == []
    driver.get(data)
    assert js(driver, "return window.pwned ?? null") is None


def test_the_browser_itself_refuses_markup_and_scripts(driver, show, small):
    """Should a script of ours ever parse data as markup, Trusted Types and the policy are there."""
    show(small)
    refused = """
    try { document.body.innerHTML = '<img src=x onerror=window.pwned=1>'; return false }
    catch (error) { return error.name }
    """
    assert js(driver, refused) == "TypeError"
    try_script = """
    const done = arguments[0], script = document.createElement('script');
    document.addEventListener('securitypolicyviolation', (event) => done(event.violatedDirective), { once: true });
    try { script.text = 'window.pwned = 1'; document.body.append(script) } catch (error) { done(error.name) }
    """
    assert driver.execute_async_script(try_script) in (
        "TypeError",
        "require-trusted-types-for",
        "script-src-elem",
    )
    elsewhere = "const done = arguments[0]; fetch('http://127.0.0.1:1/').then(() => done('sent'), (e) => done(e.name))"
    assert driver.execute_async_script(elsewhere) == "TypeError"
    assert js(driver, "return window.pwned ?? null") is None
    complaints(driver)


# --- one file --------------------------------------------------------------------------------------------------


def test_one_file_works_from_the_disk(driver, small, tmp_path):
    driver.get_log("browser")
    path = tmp_path / "page.html"
    write_page(path, page_data(small, name="file"), {"schema": "fasttc.supernodes/1", "pinned": ["E_0_0"]})
    driver.get(path.as_uri())
    ready(driver)
    assert js(driver, "return fasttc.state.current.pinned") == ["E_0_0"]
    key = features(driver, 1)[0]
    js(driver, "fasttc.state.label(arguments[0], 'kept')", key)
    deadline = time.monotonic() + 5
    while js(driver, "return fasttc.state.pending") and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.refresh()
    ready(driver)
    assert js(driver, "return fasttc.state.current.labels") == {key: "kept"}
    assert js(driver, "return fasttc.state.current.pinned") == ["E_0_0"]
    assert complaints(driver) == []
    js(driver, "localStorage.clear()")


def test_five_hundred_nodes(driver, show):
    graph = random_graph()
    show(graph, data=whole(page_data(graph, name="g")))
    assert len(texts(driver, "g.node")) >= 500
    assert "strongest 2,500 of" in element(driver, "#legend").text
    overlap = """
    const shapes = [...document.querySelectorAll('g.node.feature .shape')].map((s) => s.getBoundingClientRect());
    let pairs = 0;
    for (let i = 0; i < shapes.length; i++) for (let j = 0; j < i; j++) {
      const a = shapes[i], b = shapes[j];
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) pairs++;
    }
    return pairs;
    """
    assert js(driver, overlap) == 0
    picture(driver, "500-nodes")
