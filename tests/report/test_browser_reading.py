"""The page in a real browser: what a reader sees."""

import time
from dataclasses import replace

import pytest

from fasttc.benchmarks.page.browser import complaints, ready
from fasttc.benchmarks.page.speed import random_graph, whole
from fasttc.graph import diff, node_ids
from fasttc.report import FeatureFolder, page_data, write_page

from .conftest import HOSTILE
from .reader import chord, click_node, element, features, js, picture, press, texts, type_into


def test_opens_without_complaints_and_shows_everything_kept(driver, show, small):
    show(small)
    pruned = small.prune()
    assert len(texts(driver, "g.node")) == pruned.n_nodes
    assert driver.title == small.prompt
    assert texts(driver, "g.node.token .name") == [token.strip() for token in small.tokens]
    assert f"{pruned.n_features}" in element(driver, "#scores").text
    assert complaints(driver) == []
    picture(driver, "small")


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
    show(small, features=[FeatureFolder(write_features(pairs, text=HOSTILE[1]))])
    click_node(driver, features(driver, 1)[0])
    deadline = time.monotonic() + 5
    while not texts(driver, ".evidence") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert texts(driver, ".logits.up code") == [HOSTILE[1], "hip"]
    assert len(texts(driver, ".example")) == 7
    assert js(driver, "return document.querySelectorAll('img').length") == 0
    assert complaints(driver) == []
    picture(driver, "evidence")


def test_without_evidence_of_a_feature_the_panel_says_why(driver, show, small, write_features):
    pairs = sorted({(layer, index) for layer, _, index in small.features.tolist()})
    verdicts = dict.fromkeys(pairs, "changed")
    joint = replace(small, metadata={"adapters_from": [2000] * 4})
    data = page_data(joint, base=joint, carried=verdicts, name="g")
    show(joint, data=data, features=[FeatureFolder(write_features(pairs, text="mine"))])
    nodes = data["nodes"]
    rows = range(len(nodes["id"]))
    own, adapter = (next(row for row in rows if nodes["evidence"][row].startswith(x)) for x in ("tr", "ad"))
    base = next(row for row in rows if nodes["id"][row].endswith("_base"))
    js(driver, "fasttc.app.setShares([1, 1]); fasttc.app.setView('diff')")
    said = {}
    for name, row in (("own", own), ("adapter", adapter), ("base", base)):
        js(driver, "fasttc.app.select(arguments[0])", nodes["id"][row])
        deadline = time.monotonic() + 5
        while not (found := texts(driver, "#selection > div:last-child > *")) and time.monotonic() < deadline:
            time.sleep(0.02)
        said[name] = found
    assert said["own"][0].startswith("Feature evidence")
    assert said["adapter"] == ["No evidence of this adapter’s feature here."]
    assert said["base"][0].startswith("No evidence here: what was given is of the fine-tuned model")
    assert complaints(driver) == []


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


def test_features_of_adapters_are_told_apart(driver, show, small):
    first = 2000
    joint = replace(small, metadata={"adapters_from": [first] * 4})
    verdicts = {(layer, index): "changed" for layer, _, index in small.features.tolist()}
    show(joint, data=page_data(joint, carried=verdicts, name="g"))
    js(driver, "fasttc.app.setShares([1, 1])")
    own = js(
        driver,
        "return fasttc.app.scene.nodes.filter((n) => n.adapter).map((n) => [n.key, n.name, n.feature])",
    )
    kept = js(
        driver, "return fasttc.app.scene.nodes.filter((n) => n.kind === 'feature').map((n) => n.feature)"
    )
    assert sorted(index for *_, index in own) == sorted(index for index in kept if index >= first)
    assert all(name == f"A{index - first}" for _, name, index in own)
    assert len(texts(driver, "g.node.adapter")) == len(own) > 5
    fills = "return [...new Set([...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).fill))]"
    (gold,) = js(driver, fills, "g.node.adapter .shape")
    (grey,) = js(driver, fills, "g.node.feature:not(.adapter) .shape")
    assert gold != grey
    click_node(driver, own[0][0])
    assert texts(driver, ".heading span")[1] == "Adapter feature"
    assert texts(driver, ".facts dd")[:2] == [own[0][1], "changed"]
    picture(driver, "adapters")
    assert "adapter feature" in texts(driver, "#legend button")
    js(
        driver,
        "[...document.querySelectorAll('#legend button')].find((b) => b.textContent === 'adapter feature').click()",
    )
    assert texts(driver, "g.node.adapter") == []
    assert complaints(driver) == []


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


OVERLAPS = """
const shapes = [...document.querySelectorAll(arguments[0])].map((s) => s.getBoundingClientRect());
let pairs = 0;
for (let i = 0; i < shapes.length; i++) for (let j = 0; j < i; j++) {
  const a = shapes[i], b = shapes[j];
  if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) pairs++;
}
return pairs;
"""


def test_groups_do_not_cover_one_another(driver, show, small):
    """Many wide groups of every row, tokens and outputs too: each is a chip of its own within the drawing."""
    ids = node_ids(small)
    rows = [ids[small.token_slice][:3], ids[small.logit_slice][:2]]
    cells: dict[tuple[int, int], list[str]] = {}
    for name, (layer, position, _) in zip(ids, small.features.tolist(), strict=False):
        cells.setdefault((layer, position // 2), []).append(name)
    rows += cells.values()
    groups = [
        {"name": f"a group with a long name, number {at}", "members": list(row)}
        for at, row in enumerate(rows)
    ]
    show(small, state={"schema": "fasttc.supernodes/1", "groups": groups})
    js(driver, "fasttc.app.setShares([1, 1])")
    assert len(texts(driver, "g.node.group")) == len(groups) > 8
    assert js(driver, OVERLAPS, "g.node.group .shape, g.node.token .shape, g.node.logit .shape") == 0
    inside = "return [...document.querySelectorAll('g.node.group .shape')].map((s) => s.getBoundingClientRect().right)"
    assert max(js(driver, inside)) <= js(driver, "return document.getElementById('stage').clientWidth")
    picture(driver, "groups")


def test_five_hundred_nodes(driver, show):
    graph = random_graph()
    show(graph, data=whole(page_data(graph, name="g")))
    assert len(texts(driver, "g.node")) >= 500
    assert "strongest 2,500 of" in element(driver, "#legend").text
    assert js(driver, OVERLAPS, "g.node.feature .shape") == 0
    picture(driver, "500-nodes")
