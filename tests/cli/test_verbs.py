"""Every verb on a small model: results, files, JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttc.cli.__main__ import VERBS
from fasttc.graph import Graph, PrunedGraph
from fasttc.nn import TranscoderSet
from fasttc.worlds import ClinicalWorld

SMALL = ("--context", "32", "--batch-size", "4")


def data(home: Path) -> tuple[object, ...]:
    return ("--data", home / "text.jsonl", *SMALL)


def test_help_of_every_verb(fasttc) -> None:
    code, overview, _ = fasttc("--help")
    assert code == 0
    for verb, (_, line) in VERBS.items():
        assert verb in overview
        assert line.split()[0] in overview
        code, text, _ = fasttc(verb, "--help")
        assert code == 0
        assert "usage: " in text.lower()


def test_version_and_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fasttc", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fasttc, version ")


def test_train_wrote_transcoders_and_a_report(home: Path) -> None:
    tcs = TranscoderSet.from_pretrained(home / "tcs")
    assert len(tcs) == 4
    assert tcs[0].n_features == 64
    report = json.loads((home / "tcs.run" / "report.json").read_text())
    assert report["steps"] == 16
    assert 1000 < report["tokens"] <= 2048
    assert len((home / "tcs.run" / "metrics.jsonl").read_text().splitlines()) >= 1


def test_json_is_one_object_with_settings(fasttc, home: Path) -> None:
    code, out, err = fasttc("inspect", home / "tcs", "--json", "--seed", 7)
    assert code == 0
    shown = json.loads(out)
    assert shown["verb"] == "inspect"
    assert shown["settings"]["seed"] == 7
    assert [layer["F"] for layer in shown["layers"]] == [64] * 4
    assert err.startswith("fasttc inspect: ")


def test_finetune_then_adapt_then_evaluate(fasttc, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "ft"
    code, shown, _ = fasttc(
        "finetune", home / "model", *data(home), "--tokens", 600, "--lr", 1e-3, "--out", out, "--json"
    )
    assert code == 0
    report = json.loads(shown)
    assert report["sha256_before"] == report["sha256_after"]
    assert report["frozen"] > 0
    tcs = tmp_path / "tcs_ft"
    adapt = (
        "adapt",
        out,
        "--transcoders",
        home / "tcs",
        *data(home),
        "--tokens",
        600,
        "--out",
        tcs,
        "--json",
    )
    code, shown, _ = fasttc(*adapt)
    assert code == 0
    assert json.loads(shown)["fvu"] < json.loads(shown)["fvu_before"]
    measured = (
        "evaluate",
        out,
        "--transcoders",
        tcs,
        "--base",
        home / "tcs",
        *data(home),
        "--tokens",
        300,
        "--json",
    )
    code, shown, _ = fasttc(*measured)
    assert code == 0
    report = json.loads(shown)
    assert {"kl", "top1_error", "ce_original", "ce_replaced", "ce_ablated", "layers"} <= report.keys()
    assert all(layer["encoder_cosine"] <= 1.0 + 1e-6 for layer in report["layers"])


def test_sample_is_data_and_depends_on_the_seed(fasttc, home: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1):
        file = tmp_path / f"{len(texts)}.jsonl"
        code, _, _ = fasttc("sample", home / "model", "-n", 3, "--tokens", 12, "--seed", seed, "--out", file)
        assert code == 0
        texts.append(file.read_text())
    assert texts[0] == texts[1] != texts[2]
    assert len([json.loads(line)["text"] for line in texts[0].splitlines()]) == 3


def test_prune_and_export(fasttc, home: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "p.graph"
    code, shown, _ = fasttc(
        "graph", "prune", home / "g.graph", "--out", pruned, "--node-threshold", 0.5, "--json"
    )
    assert code == 0
    result = json.loads(shown)
    assert result["after"]["nodes"] < result["before"]["nodes"]
    assert PrunedGraph.load(pruned).n_nodes == result["after"]["nodes"]
    code, _, _ = fasttc("graph", "export", pruned, "--out", tmp_path / "json", "--slug", "one")
    assert code == 0
    exported = json.loads((tmp_path / "json" / "one.json").read_text())
    assert len(exported["nodes"]) == result["after"]["nodes"]
    assert json.loads((tmp_path / "json" / "graph-metadata.json").read_text())["graphs"][0]["slug"] == "one"


def test_fitting_options_reach_the_training(fasttc, home: Path, tmp_path: Path) -> None:
    options = ("--no-whiten", "--refit", "none", "--update-tokens", 32, "--buffer", 2, "--patience", 3)
    size = ("--features", 32, "-k", 4, "--tokens", 600, "--json")
    out = tmp_path / "tcs"
    for verb in (
        ("train", home / "model", *size[:4]),
        ("adapt", home / "model", "--transcoders", home / "tcs"),
    ):
        code, shown, err = fasttc(*verb, *data(home), *size[4:], *options, "--out", out)
        assert code == 0, err
        config = json.loads(shown)["config"]
        assert (config["whiten"], config["refit"], config["update_tokens"]) == (False, None, 32)
        assert (config["buffer"], config["patience"]) == (2, 3)
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "tcs.run")


def test_finetune_says_when_it_got_worse(fasttc, home: Path, tmp_path: Path) -> None:
    verb = ("finetune", home / "model", *data(home), "--tokens", 600)
    for rate, worse in ((1e6, True), (1e-3, False)):
        code, shown, err = fasttc(*verb, "--lr", rate, "--out", tmp_path / f"{rate}")
        assert code == 0, err
        assert ("it got worse: a lower --lr" in shown) == worse


def test_attribute_several_prompts(fasttc, home: Path, tmp_path: Path) -> None:
    texts = [prompt.text for prompt in ClinicalWorld().prompts("two_hop", 2)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(texts))
    common = ("attribute", home / "model", "--transcoders", home / "tcs", "--max-logits", 2, "--json")
    code, out, err = fasttc(*common, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "graphs")
    assert code == 0, err
    assert [row["out"] for row in json.loads(out)["graphs"]] == [
        str(tmp_path / "graphs" / f"000{number}.graph") for number in range(2)
    ]
    assert fasttc(*common, "--prompt", texts[1], "--out", tmp_path / "alone.graph")[0] == 0
    together, alone = Graph.load(tmp_path / "graphs/0001.graph"), Graph.load(tmp_path / "alone.graph")
    assert together.prompt == alone.prompt == texts[1]
    assert torch.equal(together.values, alone.values)
    (tmp_path / "prompts.txt").write_text("\n")
    code, _, err = fasttc(*common, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "none")
    assert code == 2
    assert "expected one prompt per line, got none" in err


def test_attribute_by_ids_equals_text(fasttc, home: Path, tmp_path: Path) -> None:
    graph = Graph.load(home / "g.graph")
    ids = ",".join(map(str, graph.input_ids.tolist()))
    file = tmp_path / "ids.graph"
    code, _, _ = fasttc(
        "attribute", home / "model", "--transcoders", home / "tcs", "--prompt-ids", ids, "--out", file
    )
    assert code == 0
    assert Graph.load(file).n_edges == graph.n_edges


def test_features_of_a_graph_and_by_name(fasttc, home: Path, tmp_path: Path) -> None:
    text = ("--data", home / "text.jsonl", "--context", 32, "--tokens", 500)
    common = ("features", home / "model", "--transcoders", home / "tcs", *text, "--json")
    code, out, err = fasttc(*common, "--graph", home / "g.graph", "--out", tmp_path / "plain")
    assert code == 0, err
    rows = json.loads(out)["features"]
    assert len(list((tmp_path / "plain" / "features").iterdir())) == len(rows) > 0
    code, out, err = fasttc(
        *common, "--features", "0:3,2:5", "--format", "packed", "--out", tmp_path / "packed"
    )
    assert code == 0, err
    assert [(row["layer"], row["feature"]) for row in json.loads(out)["features"]] == [(0, 3), (2, 5)]
    assert (tmp_path / "packed" / "index.json.gz").is_file()
    code, out, err = fasttc(*common, "--features", "0:3", "--format", "packed", "--out", tmp_path / "plain")
    assert (code, out) == (2, "")
    assert "expected an empty folder or an earlier packed set" in err.splitlines()[-1]
    assert len(list((tmp_path / "plain" / "features").iterdir())) == len(rows)


@pytest.mark.parametrize("kind", ["graph", "tcs", "model"])
def test_inspect_says_what_it_is(fasttc, home: Path, kind: str) -> None:
    path = {"graph": home / "g.graph", "tcs": home / "tcs", "model": home / "model"}[kind]
    expected = {"graph": "Graph(", "tcs": "transcoder set", "model": "family: gemma2"}[kind]
    code, shown, _ = fasttc("inspect", path)
    assert code == 0
    assert expected in shown
