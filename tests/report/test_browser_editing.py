"""The page in a real browser: what a reader changes, and where it is kept, served or as one file."""

import itertools
import json
import time
import xml.etree.ElementTree as ET

import pytest

from fasttc.benchmarks.page.browser import complaints, ready
from fasttc.graph import Graph, Supernodes, merge_by, node_ids
from fasttc.report import page_data, write_page

from .reader import chord, click_node, element, features, js, press, saved, texts, type_into


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
