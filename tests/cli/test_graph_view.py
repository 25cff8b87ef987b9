"""``fasttc graph view``: the file, the server, wrong input; ``--plot`` of the verbs that compute curves."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from fasttc.graph import Graph, MergedGraph, Supernodes
from fasttc.report import PageServer, write_state
from fasttc.report.state import origin


def test_one_file(fasttc, home: Path, tmp_path: Path) -> None:
    Supernodes(pinned=("E_0_0",)).save(tmp_path / "s.json")
    code, out, _ = fasttc(
        "graph", "view", home / "g.graph", "--base", home / "g.graph", "--supernodes", tmp_path / "s.json",
        "--html", tmp_path / "g.html", "--json",
    )  # fmt: skip
    assert code == 0
    html = (tmp_path / "g.html").read_text()
    assert json.loads(out)["bytes"] == (tmp_path / "g.html").stat().st_size
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', html)[1])  # type: ignore[index]
    assert data["name"] == "g"
    assert [graph["view"] for graph in data["graphs"]] == ["finetuned", "base"]
    assert len(data["nodes"]["id"]) == Graph.load(home / "g.graph").n_nodes
    assert '"pinned":["E_0_0"]' in html


def test_verdicts_of_a_carry_over_table_are_shown(fasttc, home: Path, tmp_path: Path) -> None:
    table, page = tmp_path / "features.csv", tmp_path / "g.html"
    lines = [f"{layer},{index},changed" for layer in range(4) for index in range(64)]
    table.write_text("\n".join(["layer,feature,verdict", *lines]))
    graph = home / "g.graph"
    assert fasttc("graph", "view", graph, "--base", graph, "--carry-over", table, "--html", page)[0] == 0
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page.read_text())[1])  # type: ignore[index]
    whole = Graph.load(graph)
    assert data["nodes"]["carried"].count("changed") == 2 * whole.n_features
    assert len(data["nodes"]["id"]) == whole.n_nodes + whole.n_features  # none of the features is the same
    code, _, err = fasttc("graph", "view", graph, "--carry-over", home / "text.jsonl", "--html", page)
    assert code == 2
    assert "--carry-over: expected columns layer, feature and verdict" in err.splitlines()[-1]


def test_a_merged_graph_starts_with_its_groups(fasttc, home: Path, tmp_path: Path) -> None:
    assert fasttc("graph", "merge", home / "g.graph", "--out", tmp_path / "m.graph")[0] == 0
    assert fasttc("graph", "view", tmp_path / "m.graph", "--html", tmp_path / "m.html")[0] == 0
    state = started(tmp_path / "m.html")
    kept = MergedGraph.load(tmp_path / "m.graph").supernodes()
    assert Supernodes.from_dict(state) == kept
    assert kept.groups


def started(html: Path) -> dict:
    return json.loads(re.search(r'id="page-state">(.*?)</script>', html.read_text())[1])  # type: ignore[index]


def test_one_file_starts_with_what_was_edited(fasttc, home: Path, tmp_path: Path) -> None:
    graph, page = tmp_path / "g.graph", tmp_path / "g.html"
    Graph.load(home / "g.graph").save(graph)
    Supernodes(pinned=("E_0_0",)).save(tmp_path / "g.supernodes.json")
    assert fasttc("graph", "view", graph, "--html", page)[0] == 0
    assert started(page)["pinned"] == ["E_0_0"]


def test_groups_of_an_earlier_merge_give_way_and_are_kept(
    fasttc, home: Path, tmp_path: Path, monkeypatch
) -> None:
    graph, page, file = tmp_path / "m.graph", tmp_path / "m.html", tmp_path / "m.supernodes.json"
    merge = ("graph", "merge", home / "g.graph", "--out", graph, "--supernodes")
    assert fasttc(*merge, 20)[0] == 0
    old = MergedGraph.load(graph).supernodes()
    edited = Supernodes(groups={"mine": ("E_0_0",)}, labels={"E_0_0": "start"})
    write_state(file, edited.to_dict(), origin(old.to_dict()))
    assert fasttc("graph", "view", graph, "--html", page)[0] == 0
    assert Supernodes.from_dict(started(page)) == edited  # of the same merge: the reader's

    assert fasttc(*merge, 30)[0] == 0
    new = MergedGraph.load(graph).supernodes()
    assert new.groups != old.groups
    expected = Supernodes(groups=new.groups, labels=edited.labels)
    code, _, err = fasttc("graph", "view", graph, "--html", page)
    assert (code, Supernodes.from_dict(started(page))) == (0, expected)
    assert f"the graph was merged since {file} was written" in err
    assert Supernodes.load(file) == edited  # writing a page changes nothing else
    assert fasttc("graph", "view", graph, "--html", page, "--supernodes", file)[0] == 0
    assert Supernodes.from_dict(started(page)) == edited

    monkeypatch.setattr(PageServer, "serve_forever", lambda server: None)
    code, _, err = fasttc("graph", "view", graph, "--no-open")
    kept = tmp_path / "m.supernodes.1.json"
    assert (code, Supernodes.load(file), Supernodes.load(kept)) == (0, expected, edited)
    assert f"{kept} has those of the file" in err
    code, _, err = fasttc("graph", "view", graph, "--no-open")
    assert (code, sorted(tmp_path.glob("*.json"))) == (0, [kept, file])
    assert "was merged since" not in err


def test_serves_until_interrupted(home: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "fasttc", "graph", "view", home / "g.graph", "--no-open", "--supernodes")
    with subprocess.Popen(
        (*map(str, command), str(tmp_path / "s.json")), stdout=subprocess.PIPE, text=True
    ) as served:
        try:
            assert served.stdout is not None
            url = served.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.read().startswith(b"<!doctype html>")
            served.send_signal(signal.SIGINT)
            assert served.wait(timeout=20) == 0
        finally:
            served.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.graph",), "absent.graph"),
        (("g.graph", "--features", "absent"), "features: expected a folder of feature files"),
        (
            ("g.graph", "--html", "x.html", "--supernodes", "absent.json"),
            "absent.json: expected a supernode file",
        ),
        (("g.graph", "--base", "model"), "model"),
    ],
)
def test_wrong_input_is_one_line(fasttc, home: Path, tmp_path: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(home)
    code, _, err = fasttc("graph", "view", *arguments, "--no-open")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not (home / "x.html").exists()


def test_plots_of_evaluate_and_train(fasttc, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = ("--data", home / "text.jsonl", "--context", "32", "--batch-size", "4")
    code, *_ = fasttc(
        "evaluate",
        home / "model",
        "--transcoders",
        home / "tcs",
        *data,
        "--tokens",
        500,
        "--plot",
        tmp_path / "e.png",
    )
    assert code == 0
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    train = (
        "train",
        home / "model",
        *data,
        "--features",
        32,
        "-k",
        4,
        "--tokens",
        500,
        "--out",
        tmp_path / "t",
    )
    code, *_ = fasttc(*train, "--plot", tmp_path / "t.svg")
    assert code == 0
    assert "<!-- fvu -->" in (tmp_path / "t.svg").read_text()
    code, _, err = fasttc(*train, "--plot", tmp_path / "t.gif")
    assert (code, "plot: expected a file that ends in .png" in err) == (2, True)
