"""Plots: what is drawn, the same bytes for the same numbers, and what is refused."""

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from fasttc.report import plots

pytest.importorskip("matplotlib")

REPORT = {
    "kl": 0.1,
    "top1_error": 0.02,
    "ce_original": 1.0,
    "layers": [{"layer": at, "fvu": 0.1 * at, "l0": 8.0, "ce_replaced": 1.5} for at in range(3)],
}


def words(path) -> str:
    """The text of an SVG file: matplotlib writes it as a comment before the shapes of its letters."""
    assert ET.parse(path).getroot().tag.endswith("svg")
    return path.read_text()


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": s, "tokens": 10 * s, "loss": 1 / s, "fvu": [0.5, 0.1 * s], "seconds": 1.0} for s in (1, 2, 3)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("ending", plots.FORMATS)
def test_the_same_numbers_give_the_same_file(tmp_path, log, ending):
    paths = [tmp_path / f"a{number}{ending}" for number in (1, 2)]
    for path in paths:
        plots.diff_bars(["x", "y"], [0.1, 0.2], [0.3, 0.0], path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 1000


def test_what_is_drawn_is_named(tmp_path, log):
    path = tmp_path / "a.svg"
    plots.training_curves(log, path)
    for text in ("loss", "fvu", "layer 1", "tokens"):
        assert f"<!-- {text} -->" in words(path)
    assert "<!-- seconds -->" not in words(path)
    plots.quality_by_layer(REPORT, path)
    assert "all layers replaced: KL 0.1 nats, top-1 error 2.0 %" in words(path)
    assert "added cross-entropy" in words(path)
    plots.quality_by_layer({**REPORT, "layers": [{"layer": 0, "fvu": 0.1, "l0": 1.0}]}, path)
    assert "added cross-entropy" not in words(path)


def test_shift_by_layer_names_classes_and_layer(tmp_path):
    classes = [
        {"name": name, "shift": shift, "base": [0.0, 1.0], "tuned": [1.0, shift or 0.0]}
        for name, shift in (("a", 0.5), ("b$", None))
    ]
    report = {"layers": [{"classes": classes, "explained": 0.25}] * 2}
    plots.shift_by_layer(report, tmp_path / "a.svg", layer=1)
    for text in ("layer 1: base (open) to fine-tuned, 25 % of the variance", "<!-- a -->", "<!-- b$ -->"):
        assert text in words(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="layer: expected one of the report's 2, got 2"):
        plots.shift_by_layer(report, tmp_path / "b.svg", layer=2)


def test_adapters_by_layer_without_and_with_them(tmp_path):
    path = tmp_path / "a.svg"
    hybrid = {"kl": 1.5, "nmse": [0.0, 0.1, 0.4], "l0": []}
    adapted = {"kl": 0.25, "nmse": [0.0, 0.05, 0.1], "l0": [3.0, 2.0]}
    report = {"hybrid": hybrid, "adapted": adapted}
    report |= {"single_hybrid_kl": [0.2, 0.3], "single_adapted_kl": [0.1, 0.1]}
    plots.adapters_by_layer(report, path)
    assert "KL 1.5 nats without adapters (grey), 0.25 with them" in words(path)
    assert "<!-- KL, layer alone (nats) -->" in words(path)
    plots.adapters_by_layer({**report, "single_hybrid_kl": [], "single_adapted_kl": []}, path)
    assert "layer alone" not in words(path)
    assert "<!-- L0 -->" in words(path)
    path.unlink()
    with pytest.raises(ValueError, match="report: expected at least one layer of adapters, got none"):
        plots.adapters_by_layer({**report, "adapted": hybrid}, path)
    assert not path.exists()


def test_lengths_of_paths(tmp_path):
    path = tmp_path / "a.svg"
    plots.influence_by_length({"pattern": [0.5, 0.2], "two hops": [0.1]}, path)
    assert "<!-- two hops -->" in words(path)


def test_only_the_largest_changes_are_drawn_and_names_are_text(tmp_path):
    path = tmp_path / "a.svg"
    names = ["$x^2$ <b>", "small", "middle"]
    plots.diff_bars(names, [0.0, 0.5, 0.5], [1.0, 0.5, 0.7], path, most=2)
    text = words(path)
    assert "small" not in text
    assert "middle" in text
    assert "x^2" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: plots.quality_by_layer({**REPORT, "layers": []}, p),
            "report: expected at least one layer, got none",
        ),
        (lambda p: plots.influence_by_length({}, p), "shares: expected at least one curve, got none"),
        (
            lambda p: plots.influence_by_length({"a": []}, p),
            r"shares: expected \[n\] for 'a', got shape \[0\]",
        ),
        (lambda p: plots.influence_by_length({"a": [[1.0]]}, p), r"got shape \[1, 1\]"),
        (lambda p: plots.diff_bars([], [], [], p), "names: expected one or more"),
        (lambda p: plots.diff_bars(["a"], [1.0], [1.0, 2.0], p), r"got 1 names, \[1\] and \[2\]"),
        (lambda p: plots.training_curves(p.parent / "absent", p), "absent: expected a training log"),
        (
            lambda p: plots.diff_bars(["a"], [1.0], [1.0], p.with_suffix(".gif")),
            r"plot: expected a file .*got '.*\.gif'",
        ),
    ],
)
def test_wrong_input_leaves_no_file(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected one JSON object per line"),
        ("", "expected lines with 'tokens', got 0 lines"),
        ('{"a": 1}', "expected lines with 'tokens'"),
        ('{"tokens": 1, "step": 1}', "expected a training log with metrics, got tokens, step"),
    ],
)
def test_broken_logs(tmp_path, content, message):
    log = tmp_path / "m.jsonl"
    log.write_text(content)
    with pytest.raises(ValueError, match=message):
        plots.training_curves(log, tmp_path / "a.png")


def test_without_matplotlib_there_is_one_line_of_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"plot: expected matplotlib .* pip install 'fasttc\[plots\]'"):
        plots.check_plot("a.png")
