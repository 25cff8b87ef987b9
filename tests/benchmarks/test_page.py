"""The suite of the page: what it writes, and the table of it."""

import pytest

from fasttc.benchmarks import record, report
from fasttc.benchmarks.page import speed

ROWS = [
    {"what": "opening (median of 5)", "open_ms": 1218.4, "worst_ms": 2400, "met": True},
    {"what": "dragging a node", "fps": 29.7, "worst_frame_ms": 33.33, "met": False},
]
SHOWN = {"browser": "150.0", "nodes": 512, "edges": 19218, "html_bytes": 712052}


def table(path):
    name = path.stem
    return report.rendered(f"<!-- benchmarks:{name} -->\n<!-- /benchmarks:{name} -->", path.parent)


@pytest.mark.parametrize("met", [True, False])
def test_figures_are_written_and_shown_beside_their_targets(tmp_path, monkeypatch, capsys, met):
    rows = [{**row, "met": met or row["met"]} for row in ROWS]
    monkeypatch.setattr(speed, "missing", lambda: None)
    monkeypatch.setattr(speed, "measure", lambda *settings: {**SHOWN, "rows": rows})
    out = tmp_path / "page.json"
    assert speed.main(["--out", str(out), "--seed", "3"]) == int(not met)
    written = record.read(out)
    assert (written["kind"], written["environment"]["seed"], written["rows"]) == ("page", 3, rows)
    text = table(out)
    assert "| opening (median of 5) | 1,218 ms | 2,400 ms | < 2,000 ms |" in text
    assert "| dragging a node | 29.7 frames/s | 33.3 ms between frames | > 30 frames/s |" in text
    assert "512 nodes, 19,218 edges, a file of 712,052 bytes; Chromium 150.0, headless, no GPU." in text
    assert ("MISSED: > 30 frames/s" in capsys.readouterr().out) is not met


def test_a_small_page_is_measured(tmp_path):
    if reason := speed.missing():
        pytest.skip(f"no browser: {reason}")
    speed.main(["--nodes", "60", "--rounds", "1", "--seconds", "0.3", "--out", str(tmp_path / "page.json")])
    written = record.read(tmp_path / "page.json")
    assert written["nodes"] > 40
    opening, *drags = written["rows"]
    assert opening["met"] == (0 < opening["open_ms"] < 2000)
    assert [drag["met"] for drag in drags] == [drag["fps"] > 30 for drag in drags]
    assert table(tmp_path / "page.json").count("frames/s") == 4
