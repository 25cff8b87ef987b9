"""The page in a real browser: what a reader does, and what is saved, served or as one file."""

import itertools
import json
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from fasttc.benchmarks.page.browser import complaints, ready
from fasttc.benchmarks.page.speed import random_graph, whole
from fasttc.graph import Graph, Supernodes, diff, merge_by, node_ids
from fasttc.report import FeatureFolder, page_data, write_page

from .conftest import HOSTILE
from .reader import chord, click_node, element, features, js, picture, press, saved, texts, type_into


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


def test_only_what_may_be_merged_is_grouped(driver, show, small):
    dense = small.dense()
    dense[small.logit_slice, small.error_slice] = 0.5  # so that errors have influence and are shown
    graph = Graph.from_dense(
        dense, features=small.features, activations=small.activations, input_ids=small.input_ids,
        logit_ids=small.logit_ids, logit_probs=small.logit_probs, n_layers=4,
    )  # fmt: skip
    show(graph)
    kinds = ("feature", "error", "token", "logit")
    first_two = (
        "return Object.fromEntries(arguments[0].map((kind) => [kind, "
        "fasttc.app.scene.nodes.filter((n) => n.kind === kind).slice(0, 2).map((n) => n.key)]))"
    )
    js(driver, "fasttc.app.setShares([1, 1])")
    keys = js(driver, first_two, kinds)
    group = "fasttc.app.clear(); fasttc.app.selectMany(arguments[0]); fasttc.app.group(arguments[1]);"
    group += "return document.getElementById('saved').textContent"
    for one, other in itertools.combinations(kinds, 2):
        said = js(driver, group, [keys[one][0], keys[other][0]], "mixed")
        refused = {"error", "logit"} & {one, other}
        assert texts(driver, "g.node.group .name") == ([] if refused else ["mixed"]), (one, other)
        if refused:
            name = "errors" if "error" in refused else "outputs"
            assert said == f"Not grouped: {name} merge with their like only."
        else:
            js(driver, "fasttc.state.ungroup('mixed')")
    for kind in kinds:
        js(driver, group, keys[kind], kind)
    made = js(driver, "return fasttc.state.current.groups")
    assert [one["name"] for one in made] == list(kinds)
    groups = Supernodes(groups={one["name"]: tuple(one["members"]) for one in made})
    merged, missing = merge_by(graph.prune(1.0, 1.0), groups)
    assert (missing, set(kinds) <= set(merged.names)) == ([], True)
    js(driver, group, ["group:feature", "group:error"], "mixed")
    assert "mixed" not in texts(driver, "g.node.group .name")


def test_a_group_stays_whole_while_pruning_hides_members(driver, show, small):
    show(small)
    js(driver, "fasttc.app.setShares([1, 1])")
    keys = features(driver, small.n_features)
    old, other = [keys[0], keys[-1]], keys[1]
    js(driver, "fasttc.state.group(arguments[0], 'old'); fasttc.app.setShares([0.3, 0.9])", old)
    assert js(driver, "return fasttc.app.scene.byKey.get('group:old').members.length") == 1
    js(driver, "fasttc.app.selectMany(['group:old', arguments[0]]); fasttc.app.group('new')", other)
    (group,) = js(driver, "return fasttc.state.current.groups")
    assert (group["name"], set(group["members"])) == ("new", {*old, other})


@pytest.mark.parametrize("page", [{"open": 5}, {"open": "all"}, {"open": [["a"]], "moved": 7}, None])
def test_a_broken_look_is_left_out_and_the_groups_stay(driver, show, small, page):
    keys = node_ids(small)[:2]
    groups = [{"name": "a", "members": keys}]
    show(small, state={"schema": "fasttc.supernodes/1", "groups": groups, "page": page})
    js(driver, "fasttc.app.setShares([1, 1])")
    assert texts(driver, "g.node.group .name") == ["a"]
    js(driver, "fasttc.app.toggleGroup({ group: 'a' })")
    assert js(driver, "return fasttc.state.current.open") == ["a"]
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
    while not all(path.exists() and path.stat().st_size for path in wanted) and time.monotonic() < deadline:
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
    saved(driver, server)  # what is said of that comes before what is said of the next file
    path.write_text("{}")
    element(driver, "#state-file").send_keys(str(path))
    deadline, said = time.monotonic() + 5, ""
    while "Not read" not in said and time.monotonic() < deadline:
        said = element(driver, "#saved").text
    assert said.startswith("Not read: expected schema")
    assert texts(driver, "g.node.group .name") == ["again"]


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


def test_a_file_written_anew_shows_what_it_brings_and_keeps_the_edits(driver, small, tmp_path):
    path, (one, two, three) = tmp_path / "page.html", node_ids(small)[:3]

    def opened(**groups):
        listed = [{"name": name, "members": members} for name, members in groups.items()]
        write_page(path, page_data(small, name="anew"), {"schema": "fasttc.supernodes/1", "groups": listed})
        driver.get(path.as_uri())
        ready(driver)

    def names():
        return js(driver, "return fasttc.state.current.groups.map((g) => g.name)")

    def wait():
        deadline = time.monotonic() + 5
        while js(driver, "return fasttc.state.pending") and time.monotonic() < deadline:
            time.sleep(0.02)

    driver.get_log("browser")
    opened(first=[one, two])
    js(driver, "fasttc.state.renameGroup('first', 'mine')")
    wait()
    opened(first=[one, two])
    assert names() == ["mine"]
    opened(second=[one, three])
    assert names() == ["second"]
    assert element(driver, "#saved").text.startswith("This file was written anew. Undo shows")
    element(driver, "#undo").click()
    assert names() == ["mine"]
    element(driver, "#redo").click()
    assert names() == ["second"]
    js(driver, "fasttc.state.renameGroup('second', 'too')")
    wait()
    driver.refresh()
    ready(driver)
    assert (names(), element(driver, "#saved").text) == (["too"], "")
    opened(first=[one, two])
    assert names() == ["mine"]  # still there
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
