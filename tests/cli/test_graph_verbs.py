"""``fasttc graph merge``, ``paths`` and ``diff`` on the small model's graph."""

import json
import math
from pathlib import Path

import pytest
import torch

from fasttc.graph import Graph, MergedGraph, PrunedGraph, Supernodes, length_profile, node_ids


def test_merge_writes_a_graph_and_groups_that_it_reads_again(fasttc, home: Path, tmp_path: Path) -> None:
    out, groups = tmp_path / "m.graph", tmp_path / "g.supernodes.json"
    code, shown, _ = fasttc(
        "graph", "merge", home / "g.graph", "--out", out, "--save-groups", groups, "--json"
    )
    assert code == 0
    result = json.loads(shown)
    merged = MergedGraph.load(out)
    assert result["loss"] == merged.loss.to_dict()
    assert result["loss"]["completeness_kept"] >= 0.85
    assert len(result["supernodes"]) == merged.n_nodes == result["loss"]["nodes_after"]
    assert Supernodes.load(groups) == merged.supernodes()
    code, again, _ = fasttc("graph", "merge", home / "g.graph", "--from", groups, "--json")
    assert json.loads(again)["loss"] == result["loss"]
    few = ("--supernodes", 1, "--transcoders", home / "tcs", "--json")  # logits stay on their own
    code, shown, _ = fasttc("graph", "merge", out, *few)
    assert code == 0
    assert json.loads(shown)["loss"]["nodes_after"] < merged.n_nodes


def test_paths_and_shares(fasttc, home: Path, tmp_path: Path) -> None:
    code, shown, _ = fasttc("graph", "paths", home / "g.graph", "-k", 3, "--json")
    assert code == 0
    (one,) = json.loads(shown)["graphs"]
    assert len(one["paths"]) == 3
    assert one["paths"][0]["strength"] >= one["paths"][2]["strength"] > 0
    token = next(path["nodes"][0] for path in one["paths"])
    layer, _, index = Graph.load(home / "g.graph").features[-1].tolist()
    feature = f"{layer}/{index}"
    groups = tmp_path / "groups.json"
    Supernodes(groups={"start": (token,)}).save(groups)
    named = ("--from", "start", "--groups", groups, "--through", feature, "--concept", feature)
    code, shown, _ = fasttc("graph", "paths", home / "g.graph", *named, "--json")
    result = json.loads(shown)
    assert code == 0
    assert all(path["nodes"][0] == token for path in result["graphs"][0]["paths"])
    assert 0 <= result["mechanism"]["multi_hop"] <= 1
    code, text, _ = fasttc("graph", "paths", home / "g.graph", "--concept", feature)
    assert "multi-hop share" in text


def test_what_fires_together_is_evidence(fasttc, home: Path) -> None:
    rows = ("graph", "merge", home / "g.graph", "--supernodes", 30, "--transcoders", home / "tcs", "--json")
    code, alone, _ = fasttc(*rows)
    assert code == 0
    text = ("--model", home / "model", "--data", home / "text.jsonl", "--context", 32, "--tokens", 1000)
    code, shown, _ = fasttc(*rows, *text)
    assert code == 0
    assert json.loads(shown)["loss"]["nodes_after"] == json.loads(alone)["loss"]["nodes_after"]
    assert json.loads(shown)["supernodes"] != json.loads(alone)["supernodes"]


def test_a_graph_without_edges_has_nothing_to_merge(fasttc, tmp_path: Path) -> None:
    nothing = torch.zeros(4, 4)
    bare = {"features": torch.zeros(0, 3, dtype=torch.int64), "activations": [], "input_ids": [1]}
    Graph.from_dense(nothing, **bare, logit_ids=[2, 3], logit_probs=[0.5, 0.5]).save(tmp_path / "bare.graph")
    code, shown, _ = fasttc("graph", "merge", tmp_path / "bare.graph", "--out", tmp_path / "m.graph")
    assert code == 0
    assert shown.startswith("0 nodes -> 0 supernodes: no node of this graph has an edge")
    _, shown, _ = fasttc("graph", "merge", tmp_path / "m.graph", "--json")
    result = json.loads(shown)
    assert (result["supernodes"], result["loss"]["nodes_before"], result["loss"]["completeness_kept"]) == (
        [],
        0,
        None,
    )


def test_files_that_are_nested_too_deep_are_refused(fasttc, home: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for command in (
        ("import", deep, "--out", tmp_path / "x.graph"),
        ("merge", home / "g.graph", "--from", deep),
    ):
        code, out, err = fasttc("graph", *command)
        assert (code, out) == (2, "")
        assert f"expected a JSON file, {deep} is not one" in err.splitlines()[-1]
    assert not (tmp_path / "x.graph").exists()


def test_pruning_again_tells_what_was_read_and_what_was_whole(fasttc, home: Path, tmp_path: Path) -> None:
    once, twice, sizes = tmp_path / "once.graph", tmp_path / "twice.graph", ("nodes", "features", "edges")
    whole = Graph.load(home / "g.graph")
    _, shown, _ = fasttc("graph", "prune", home / "g.graph", "--out", once, "--json")
    first = json.loads(shown)
    assert first["scores"] == whole.scores()._asdict()
    assert first["scores_as_read"] is None
    rule = ("--node-threshold", 0.5, "--out", twice)
    code, shown, _ = fasttc("graph", "prune", once, *rule, "--json")
    again = json.loads(shown)
    assert code == 0
    assert again["before"] == first["after"]
    assert all(again["after"][size] < again["before"][size] for size in sizes)
    assert (again["scores"], again["scores_as_read"]) == (first["scores"], first["pruned_scores"])
    assert again["pruned_scores"]["completeness"] < first["pruned_scores"]["completeness"]
    origin = Graph.load(twice).metadata["pruned"]
    assert origin == {
        "nodes": whole.n_nodes,
        "edges": whole.n_edges,
        "node_threshold": 0.5,
        "edge_threshold": 0.98,
    }
    assert PrunedGraph.load(twice).full_scores == whole.scores()
    text = fasttc("graph", "prune", once, *rule)[1].splitlines()
    assert [line.split(":")[0] for line in text[1:4]] == ["whole graph", "as read", "kept part"]
    fasttc("graph", "export", once, "--out", tmp_path)
    fasttc("graph", "import", tmp_path / "once.json", "--out", tmp_path / "imported.graph")
    text = fasttc("graph", "prune", tmp_path / "imported.graph", *rule)[1].splitlines()
    assert f" of {first['after']['nodes']:,} nodes" in text[0]
    assert [line.split(":")[0] for line in text[1:3]] == ["as read", "kept part"]  # its whole is unknown
    assert math.isnan(PrunedGraph.load(twice).full_scores.completeness)


def test_a_named_feature_need_not_be_in_every_graph(fasttc, home: Path, tmp_path: Path) -> None:
    whole, small = home / "g.graph", tmp_path / "small.graph"
    graph = Graph.load(whole)
    pruned = graph.prune(0.5)
    pruned.save(small)
    there, here = (
        [(layer, index) for layer, _, index in one.features.tolist()]
        for one in (graph, pruned.compact().graph)
    )
    feature = "{}/{}".format(*next(one for one in there if one not in here))
    rules = ("--concept", feature, "--avoiding", feature, "--json")
    code, shown, _ = fasttc("graph", "paths", whole, small, *rules)
    assert code == 0
    result = json.loads(shown)
    active, absent = result["mechanism"]["prompts"]
    assert active["concepts"] > 0 < active["multi_hop"]
    assert (absent["concepts"], absent["multi_hop"]) == (0, 0.0)
    for path, given, found in (
        (whole, rules, result["graphs"][0]),
        (small, ("--json",), result["graphs"][1]),
    ):
        assert json.loads(fasttc("graph", "paths", path, *given)[1])["graphs"] == [found]
    code, _, said = fasttc("graph", "paths", small, "--concept", feature)
    assert code == 2
    assert (
        f"--concept: expected a node id, LAYER/FEATURE or a group, of at least one of the graphs, got '{feature}'"
        in said
    )


def test_lengths_are_of_the_logit_that_is_asked_for(fasttc, home: Path) -> None:
    graph = Graph.load(home / "g.graph")
    for logit in (0, 1):
        _, shown, _ = fasttc("graph", "paths", home / "g.graph", "--logit", logit, "--json")
        lengths = json.loads(shown)["graphs"][0]["lengths"]
        assert lengths["tokens"] == length_profile(graph, logit).tokens


def test_diff_of_two_models(fasttc, home: Path, tmp_path: Path) -> None:
    graph = home / "g.graph"
    pair = ("graph", "diff", graph, graph, "--prompts", graph, graph)
    table = tmp_path / "features.csv"
    lines = [f"{layer},{index},kept" for layer in range(4) for index in range(64)]
    table.write_text("\n".join(["layer,feature,verdict", *lines]))
    code, shown, _ = fasttc(*pair, "--carry-over", table, "--joint", tmp_path / "joint.json", "--json")
    assert code == 0
    result = json.loads(shown)
    assert {change["status"] for change in result["nodes"]} == {"kept"}
    assert all(change["trusted"] for change in result["nodes"])
    assert {one["p"] for one in result["features"]} == {1.0}
    assert {node["owner"] for node in json.loads((tmp_path / "joint.json").read_text())["nodes"]} == {"both"}
    table.write_text(table.read_text().replace("kept", "changed"))
    code, text, _ = fasttc(*pair, "--carry-over", table)
    assert "features over 2 prompts" in text
    assert "lost (not trusted)" in text
    _, shown, _ = fasttc(*pair, "--carry-over", table, "--json")
    assert all(0 in (one["base"], one["tuned"]) for one in json.loads(shown)["features"])  # none is paired


def test_plots_of_paths_and_diffs(fasttc, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    graph, plot = home / "g.graph", tmp_path / "a.svg"
    again = tmp_path / "other" / "g.graph"
    Graph.load(graph).save(again)
    code, shown, _ = fasttc("graph", "paths", graph, "--plot", plot)
    assert code == 0
    assert f"wrote {plot}" in shown
    assert "<!-- ends in tokens -->" in plot.read_text()
    assert "not stored" not in plot.read_text()
    assert fasttc("graph", "paths", graph, again, "--plot", plot)[0] == 0
    assert f"<!-- {again} -->" in plot.read_text()  # both are called g: then their paths tell them apart
    assert fasttc("graph", "diff", graph, graph, "--plot", plot)[0] == 0
    assert "base (grey) and fine-tuned" in plot.read_text()
    groups = tmp_path / "groups.json"
    Supernodes(groups={"all of it": ("E_5_3",)}).save(groups)
    assert fasttc("graph", "diff", graph, graph, "--groups", groups, "--plot", plot)[0] == 0
    assert "<!-- all of it -->" in plot.read_text()
    code, _, said = fasttc("graph", "paths", graph, "--plot", tmp_path / "a.gif")
    assert code == 2
    assert "plot: expected a file that ends in .png, .svg, .pdf" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "{home}/no.graph"), "there is no file of that name"),
        (("merge", "{home}/g.graph", "--budget", "2"), "--budget: expected a share from 0 to 1, got 2"),
        (("merge", "{home}/g.graph", "--supernodes", "0"), "supernodes: expected at least 1, got 0"),
        (("merge", "{home}/g.graph", "--from", "{home}/text.jsonl"), "expected a JSON file"),
        (
            ("merge", "{home}/g.graph", "--supernodes", "3", "--min-edges", "0.83"),
            "--min-edges: expected none beside --supernodes, got 0.83",
        ),
        (
            ("merge", "{home}/g.graph", "--from", "x", "--budget", "0.2"),
            "--budget: expected none beside --from, got 0.2",
        ),
        (
            ("merge", "{home}/g.graph", "--from", "x", "--min-agreement", "1"),
            "--min-agreement: expected none beside --from, got 1.0",
        ),
        (
            ("merge", "{home}/g.graph", "--from", "x", "--supernodes", "3"),
            "--supernodes: expected none beside --from",
        ),
        (
            ("merge", "{home}/g.graph", "--from", "x", "--transcoders", "t"),
            "--transcoders: expected none beside --from",
        ),
        (
            ("paths", "{home}/g.graph", "--through", "x"),
            "--through: expected a node id, LAYER/FEATURE or a group",
        ),
        (("paths", "{home}/g.graph", "-k", "0"), "k: expected at least 1, got 0"),
        (("diff", "{home}/g.graph", "{home}/g.graph", "--carry-over", "x"), "there is no file x"),
        (
            ("diff", "{home}/g.graph", "{home}/g.graph", "--carry-over", "{home}/text.jsonl"),
            "expected columns layer",
        ),
    ],
)
def test_wrong_input_is_one_line(fasttc, home: Path, arguments, message) -> None:
    code, out, err = fasttc("graph", *(argument.format(home=home) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_export_and_import(fasttc, home: Path, tmp_path: Path) -> None:
    merged, groups = tmp_path / "m.graph", tmp_path / "g.json"
    fasttc("graph", "merge", home / "g.graph", "--out", merged)
    assert fasttc("graph", "export", merged, "--out", tmp_path / "json")[0] == 0
    written = json.loads((tmp_path / "json" / "m.json").read_text())
    assert len(written["qParams"]["supernodes"]) == len(MergedGraph.load(merged).supernodes().groups)
    back = (
        "graph",
        "import",
        tmp_path / "json" / "m.json",
        "--out",
        tmp_path / "b.graph",
        "--save-groups",
        groups,
    )
    code, shown, _ = fasttc(*back, "--json")
    assert code == 0
    assert json.loads(shown)["edges"] == MergedGraph.load(merged).pruned.n_edges
    assert Supernodes.load(groups).groups == MergedGraph.load(merged).supernodes().groups
    for kind in ("graphml", "dot"):
        out = tmp_path / f"m.{kind}"
        assert fasttc("graph", "export", merged, "--out", out, "--format", kind)[0] == 0
        assert out.stat().st_size > 100
        refused = fasttc(
            "graph", "export", merged, "--out", tmp_path / "no", "--format", kind, "--groups", groups
        )
        assert (refused[0], (tmp_path / "no").exists()) == (2, False)
        assert f"--groups: expected --format json, got {kind}" in refused[2].splitlines()[-1]
    code, text, _ = fasttc("inspect", merged, "--json")
    assert json.loads(text)["kind"] == "merged graph"


def test_labels_and_groups_reach_the_viewers_and_come_back(fasttc, home: Path, tmp_path: Path) -> None:
    graph, out, groups, back = home / "g.graph", tmp_path / "json", tmp_path / "s.json", tmp_path / "back"
    pruned = Graph.load(graph).prune()
    ids = node_ids(pruned.graph, pruned.node_mask)
    features, logit = ids[: pruned.n_features], ids[-1]
    gone = next(one for one in node_ids(pruned.graph)[: pruned.graph.n_features] if one not in ids)
    labels = {features[0]: "</script> é", features[1]: "hip", logit: "an output", gone: "not kept"}
    given = Supernodes(
        groups={"a": (features[0], gone), "none": ("9_9_9",)}, labels=labels, pinned=(features[2], gone)
    )
    given.save(groups)
    export = ("graph", "export", graph, "--out", out, "--groups", groups)
    code, shown, _ = fasttc(*export, "--json")
    result = json.loads(shown)
    assert (code, result["missing"], result["labels_left_out"]) == (0, [gone, "9_9_9"], 1)
    assert "</script>" not in (out / "g.json").read_text()
    content = json.loads((out / "g.json").read_text())
    clerps = {node["node_id"]: node["clerp"] for node in content["nodes"]}
    assert (clerps[features[0]], clerps[features[1]], clerps[features[2]]) == ("</script> é", "hip", "")
    assert clerps[logit].startswith('Output "')
    assert content["qParams"]["supernodes"] == [["a", features[0]]]
    assert content["qParams"]["pinnedIds"] == [features[2], features[0]]
    text = fasttc(*export)[1]
    assert f"2 nodes of {groups} are not in this graph" in text
    assert "1 labels of outputs are not written" in text

    code, text, _ = fasttc("graph", "import", out / "g.json", "--out", tmp_path / "b.graph")
    assert (code, "1 supernodes, 2 labels" in text, "--save-groups writes them" in text) == (0, True, True)
    again = tmp_path / "again.json"
    assert (
        fasttc("graph", "import", out / "g.json", "--out", tmp_path / "b.graph", "--save-groups", again)[0]
        == 0
    )
    assert Supernodes.load(again).labels == {one: labels[one] for one in features[:2]}
    options = ("--out", back, "--slug", "g", "--groups", again)
    assert fasttc("graph", "export", tmp_path / "b.graph", *options)[0] == 0
    returned = json.loads((back / "g.json").read_text())
    assert {node["node_id"]: node["clerp"] for node in returned["nodes"]} == clerps
    assert returned["qParams"] == content["qParams"]
