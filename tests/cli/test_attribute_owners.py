"""``fasttc attribute`` with adapters, and with the edges split by attention head."""

import json
import re
from pathlib import Path

import pytest
import torch

from fasttc.graph import Graph, load_graph
from fasttc.models import adapter_sites, load
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.worlds import ClinicalWorld

PROMPT = ClinicalWorld().prompts("two_hop", 1)[0].text


@pytest.fixture(scope="module")
def adapters(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters of the small model."""
    model, _ = load(home / "model")
    torch.manual_seed(0)
    made = []
    for _ in range(4):
        adapter = TranscoderAdapter(model.config.hidden_size, 8)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.3)
        made.append(adapter)
    path = tmp_path_factory.mktemp("adapters") / "ad"
    AdapterSet(made, adapter_sites(model)).save_pretrained(path)
    return path


def test_adapters_beside_transcoders_and_alone(fasttc, home: Path, adapters: Path, tmp_path: Path) -> None:
    common = ("attribute", home / "model", "--adapters", adapters, "--prompt", PROMPT)
    out = tmp_path / "joint.graph"
    code, shown, err = fasttc(*common, "--transcoders", home / "tcs", "--out", out, "--json")
    assert code == 0, err
    graph = Graph.load(out)
    assert json.loads(shown)["of_adapters"] == int(graph.from_adapter.sum())
    assert 0 < int(graph.from_adapter.sum()) < graph.n_features
    assert graph.metadata["adapters_from"] == [64] * 4
    small = tmp_path / "small.graph"
    assert fasttc("graph", "prune", out, "--out", small, "--node-threshold", 0.95)[0] == 0
    assert fasttc("graph", "export", small, "--out", tmp_path / "json")[0] == 0
    assert fasttc("graph", "import", tmp_path / "json/small.json", "--out", tmp_path / "back.graph")[0] == 0
    found = [load_graph(path).graph.owners for path in (small, tmp_path / "back.graph")]
    assert found[0] == found[1]
    assert set(found[0]) == {"adapter", "transcoder"}
    evidence = ("features", home / "model", "--data", home / "text.jsonl", "--context", 32, "--tokens", 500)
    for owner, given in (("transcoder", ("--transcoders", home / "tcs")),
                         ("adapter", ("--adapters", adapters, "--base", home / "model"))):  # fmt: skip
        code, shown, err = fasttc(*evidence, *given, "--graph", small, "--out", tmp_path / owner, "--json")
        assert code == 0, err
        kept = load_graph(small).graph
        expected = {(x[0], x[2] - 64 * (owner == "adapter")) for x, own in
                    zip(kept.features.tolist(), kept.owners, strict=True) if own == owner}  # fmt: skip
        assert {(one["layer"], one["feature"]) for one in json.loads(shown)["features"]} == expected
    folders = ("--features", tmp_path / "transcoder", "--features", tmp_path / "adapter")
    assert fasttc("graph", "view", small, *folders, "--html", tmp_path / "p.html")[0] == 0
    page = json.loads(re.search(r'id="page-data">(.*?)</script>', (tmp_path / "p.html").read_text())[1])  # type: ignore[index]
    assert page["evidence"].keys() == {key for key in page["nodes"]["evidence"] if key}
    assert {key.split("/")[0] for key in page["evidence"]} == {"transcoder", "adapter"}
    code, _, err = fasttc(*evidence, *given, "--graph", home / "g.graph", "--out", tmp_path / "none")
    assert code == 2
    assert "--graph: expected features of adapters, got none" in err.splitlines()[-1]
    layer, _, index = graph.features[graph.from_adapter][0].tolist()
    code, shown, _ = fasttc("graph", "paths", out, "--through", f"{layer}/A{index - 64}", "-k", 2)
    assert code == 0
    assert f"L{layer}/A{index - 64}@" in shown
    alone = tmp_path / "alone.graph"
    code, shown, err = fasttc(*common, "--base", home / "model", "--out", alone)
    assert code == 0, err
    whole = Graph.load(alone)
    assert bool(whole.from_adapter.all())
    assert f"{whole.n_features:,} features ({whole.n_features:,} of adapters)" in shown


def test_split_by_head_adds_up(fasttc, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.graph"
    common = ("attribute", home / "model", "--transcoders", home / "tcs", "--prompt", PROMPT, "--out", out)
    code, shown, err = fasttc(*common, "--split-by-head", 5, "--json")
    assert code == 0, err
    edges = json.loads(shown)["heads"]
    assert len(edges) == 5
    graph = Graph.load(out)
    for edge in edges:
        parts = sum(head["part"] for head in edge["heads"])
        # The named heads are the largest of 16: what is left over is no larger than the others can be.
        least = min((abs(head["part"]) for head in edge["heads"]), default=0.0)
        assert abs(edge["edge"] - edge["direct"] - parts) <= 12 * least + 1e-5 * abs(edge["edge"])
        assert float(graph.values[(graph.values - edge["edge"]).abs().argmin()]) == pytest.approx(
            edge["edge"]
        )
    code, shown, _ = fasttc(*common, "--split-by-head", 5)
    assert "by head (layer.head)" in shown
    assert f"{edges[0]['source']} -> {edges[0]['target']}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected --transcoders, --adapters or both, got neither"),
        (("--adapters", "{adapters}"), "base: expected the model whose MLPs run beside adapters"),
        (("--transcoders", "{home}/tcs", "--base", "{home}/model"), "base: expected adapters with it"),
        (("--adapters", "{home}/tcs"), "expected a set of adapters"),
        (("--transcoders", "{adapters}"), "expected"),
        (("--transcoders", "{home}/tcs", "--split-by-head", "-1"), "-1"),
    ],
)
def test_wrong_input_is_one_line(
    fasttc, home: Path, adapters: Path, tmp_path: Path, options, message
) -> None:
    given = [option.format(home=home, adapters=adapters) for option in options]
    code, out, err = fasttc("attribute", home / "model", "--prompt", PROMPT, "--out", tmp_path / "g", *given)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "g").exists()
