"""What the page is given and what it is made of: no browser needed."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from fasttc.graph import node_ids
from fasttc.report import FeatureFolder, page, page_data, page_html, with_evidence, write_page
from fasttc.report.state import origin

from .conftest import HOSTILE


class Elements(HTMLParser):
    """Every element that a parser finds, and the raw text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        if self.cdata_elem:
            tag, attributes, text = self.raw.pop()
            self.raw.append((tag, attributes, text + data))


def embedded(html: str, name: str):
    (found,) = [text for _, attributes, text in Elements(html).raw if attributes.get("id") == name]
    return json.loads(found)


def test_the_graph_comes_back_from_the_data(small):
    data = json.loads(json.dumps(page_data(small)))
    (own,), nodes = data["graphs"], data["nodes"]
    assert [nodes["id"][row] for row in own["nodes"]] == node_ids(small)
    assert torch.equal(torch.tensor(own["values"], dtype=torch.float32), small.values)
    assert own["row_ptr"] == small.row_ptr.tolist()
    assert own["columns"] == small.columns.tolist()
    assert torch.equal(torch.tensor(own["probabilities"], dtype=torch.float32), small.logit_probs)
    assert own["thresholds"] == [0.8, 0.98]
    assert own["scores"] == small.scores()._asdict()
    assert nodes["kind"].count("feature") == small.n_features


def test_nodes_of_two_graphs_are_matched_by_what_they_are(small, tuned):
    data = page_data(tuned, base=small)
    first, second = data["graphs"]
    assert (first["view"], second["view"]) == ("finetuned", "base")
    assert len(data["nodes"]["id"]) == len(set(data["nodes"]["id"])) == small.n_nodes
    for graph, own in ((tuned, first), (small, second)):
        rows = own["nodes"]
        assert [data["nodes"]["layer"][row] for row in rows] == graph.node_layer.tolist()
        assert [data["nodes"]["position"][row] for row in rows] == graph.node_position.tolist()
    features = {tuple(feature) for feature in tuned.features.tolist()}
    assert features < {tuple(feature) for feature in small.features.tolist()}


def test_two_graphs_of_different_prompts_are_refused(small):
    other = replace(small, input_ids=small.input_ids + 1)
    with pytest.raises(
        ValueError, match=r"base: expected a graph of the same prompt .* got 6 tokens, 4 layers"
    ):
        page_data(small, base=other)


def test_two_graphs_in_which_a_number_has_two_owners_are_refused(small):
    adapters = replace(small, metadata={"adapters_from": [0] * 4})
    with pytest.raises(ValueError, match="a transcoder's feature in one graph and an adapter's in the other"):
        page_data(adapters, base=small)


def test_a_pruned_graph_is_shown_whole(small):
    pruned = small.prune(0.7, 0.9)
    (own,) = page_data(pruned)["graphs"]
    assert own["thresholds"] == [1.0, 1.0]
    assert len(own["values"]) == pruned.n_edges
    assert own["scores"] == pruned.full_scores._asdict()
    assert own["whole"]["nodes"] == small.n_nodes
    assert sum(own["remainder"]) > 0


def test_large_graphs_are_pruned_to_fit(small, monkeypatch):
    monkeypatch.setattr(page, "MAX_EDGES", small.n_edges // 3)
    (own,) = page_data(small)["graphs"]
    assert 0 < len(own["values"]) <= small.n_edges // 3
    assert own["whole"]["edges"] == small.n_edges


def test_scores_that_are_not_numbers_become_null(small):
    no_edges = {
        "row_ptr": torch.zeros_like(small.row_ptr),
        "columns": small.columns[:0],
        "values": small.values[:0],
    }
    silent = replace(small, **no_edges)
    (own,) = page_data(silent)["graphs"]
    assert own["scores"]["replacement"] is None
    page_html(page_data(silent))


def test_owners_and_verdicts_are_columns(small, tuned):
    joint = replace(small, metadata={"adapters_from": [2000] * 4})
    nodes = page_data(joint)["nodes"]
    for at, (_, _, index) in enumerate(small.features.tolist()):
        expected = ("adapter", f"A{index - 2000}") if index >= 2000 else ("", f"#{index}")
        assert (nodes["owner"][at], nodes["number"][at]) == expected
    assert set(nodes["owner"][small.n_features :]) == {""}
    assert set(nodes["carried"]) == {""}
    verdicts = {(layer, index): ("kept", "changed")[index % 2] for layer, _, index in small.features.tolist()}
    data = page_data(tuned, base=small, carried=verdicts)
    nodes = data["nodes"]
    rows = zip(nodes["kind"], nodes["layer"], nodes["feature"], nodes["carried"], strict=True)
    assert all(
        verdict == verdicts.get((layer, index), "")
        for kind, layer, index, verdict in rows
        if kind == "feature"
    )
    changed = sum(index % 2 for _, _, index in tuned.features.tolist())
    assert len(nodes["id"]) == len(set(nodes["id"])) == small.n_nodes + changed  # these are two nodes each
    assert 0 < changed < tuned.n_features
    adapted = replace(tuned, metadata={"adapters_from": [0] * 4})
    assert (
        len(page_data(adapted, base=replace(small, metadata=adapted.metadata), carried={})["nodes"]["id"])
        == small.n_nodes
    )


def test_labels_are_given_to_features(small):
    layer, _, index = small.features[0].tolist()
    nodes = page_data(small, labels={(layer, index): HOSTILE[0]})["nodes"]
    assert HOSTILE[0] in nodes["label"]


def test_hostile_strings_stay_data(hostile):
    state = {"schema": "fasttc.supernodes/1", "labels": {"0": HOSTILE[0]}}
    data = page_data(hostile, name=HOSTILE[1])
    html = page_html(data, state)
    plain = Elements(
        page_html(page_data(replace(hostile, tokens=[], logit_labels=[], prompt="", metadata={})))
    )
    assert [tag for tag, _ in Elements(html).tags] == [tag for tag, _ in plain.tags]
    assert embedded(html, "page-data") == {**data, "served": False, "origin": origin(state)}
    assert embedded(html, "page-state") == state
    assert "window.pwned" not in html.split('id="page-data"')[0]


@pytest.mark.parametrize("served", [False, True])
def test_the_policy_allows_these_scripts_and_nothing_else(small, served):
    parsed = Elements(page_html(page_data(small), served=served))
    (policy,) = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == ("'self'" if served else "'none'")
    assert "unsafe" not in policy
    scripts = [text for tag, attributes, text in parsed.raw if tag == "script" and "type" not in attributes]
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    }
    assert set(rules["script-src"].split()) == hashes
    assert len(hashes) == 15


def test_nothing_is_loaded_from_anywhere(small):
    html = page_html(page_data(small))
    sources = [
        a.get(name) for _, a in Elements(html).tags for name in ("src", "href") if a.get(name) is not None
    ]
    assert sources == ["data:,"]
    own = re.sub(r"<script>// https://d3js.org.*?</script>", "", html, flags=re.DOTALL)
    assert set(re.findall(r"https?://[\w.]+", own)) <= {"http://www.w3.org"}


@pytest.mark.parametrize(
    "sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", ".html("]
)
def test_our_scripts_never_parse_strings(sink):
    for name in page._SCRIPTS[1:]:
        assert sink not in page._asset(name), name


def test_evidence_travels_with_the_page_as_far_as_there_is_room(small, write_features, monkeypatch):
    pairs = sorted({(layer, index) for layer, _, index in small.features.tolist()})
    folder = [FeatureFolder(write_features(pairs[:5]))]
    data, left_out = with_evidence(page_data(small), folder)
    assert set(data["evidence"]) == {f"transcoder/{layer}/{index}" for layer, index in pairs[:5]}
    assert left_out == 0
    monkeypatch.setattr(page, "_EVIDENCE_BYTES", 1000)
    data, left_out = with_evidence(page_data(small), folder)
    assert len(data["evidence"]) + left_out == 5
    assert left_out > 0


def test_evidence_is_of_the_owners_own_features(small, write_features):
    """Feature 1000 of an adapter is not feature 1000 of the transcoder, nor feature 3000 of both together."""
    joint = replace(small, metadata={"adapters_from": [2000] * 4})
    places = [(layer, index) for layer, _, index in small.features.tolist()]
    own = [(layer, index - 2000 * (index >= 2000)) for layer, index in places]
    transcoders = FeatureFolder(write_features([*places, *own], text="transcoder"))
    adapters = FeatureFolder(write_features([*places, *own], text="adapter", name="a", owner="adapter"))
    for folders in ([transcoders], [adapters], [transcoders, adapters], [adapters, transcoders]):
        data, _ = with_evidence(page_data(joint), folders)
        for row, ((layer, index), (_, number)) in enumerate(zip(places, own, strict=True)):
            owner = "adapter" if index >= 2000 else "transcoder"
            assert data["nodes"]["evidence"][row] == f"{owner}/{layer}/{number}"
            found = data["evidence"].get(f"{owner}/{layer}/{number}")
            given = (adapters if owner == "adapter" else transcoders) in folders
            assert (found["top"][0] if found else None) == (owner if given else None)
    assert set(data["nodes"]["evidence"][small.n_features :]) == {""}


def test_what_the_base_meant_by_a_number_has_no_evidence(small, tuned, write_features):
    places = {(layer, index) for layer, _, index in small.features.tolist()}
    verdicts = {place: ("kept", "changed")[place[1] % 2] for place in places}
    data, _ = with_evidence(
        page_data(tuned, base=small, carried=verdicts), [FeatureFolder(write_features(sorted(places)))]
    )
    nodes, in_tuned = data["nodes"], set(data["graphs"][0]["nodes"])
    for row, (kind, layer, index) in enumerate(
        zip(nodes["kind"], nodes["layer"], nodes["feature"], strict=True)
    ):
        if kind == "feature":
            shown = verdicts[layer, index] == "kept" or row in in_tuned
            assert nodes["evidence"][row] == (f"transcoder/{layer}/{index}" if shown else "")
    assert nodes["evidence"].count("") > small.n_nodes - small.n_features
    assert set(page_data(tuned, base=small)["nodes"]["evidence"][: tuned.n_features]) != {""}


def test_the_file_is_whole_or_absent(small, tmp_path):
    write_page(tmp_path / "a.html", page_data(small))
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match="Out of range float"):
        write_page(tmp_path / "b.html", {"x": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_assets_are_small_enough_to_read():
    for name in page._SCRIPTS[1:]:
        assert page._asset(name).count("\n") < 400, name
