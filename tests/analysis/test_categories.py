"""Categories of features: counts and shares by hand, labels from files, judges and programs, and wrong ones."""

import json
import math
import sys
from pathlib import Path

import pytest

from fasttc.analysis import ask_command, feature_categories, judged, read_features, read_labels

ROWS = [
    {"layer": 0, "feature": 1, "firing_rate": 0.5, "strength": 3.0},
    {"layer": 0, "feature": 2, "firing_rate": 0.0, "strength": 0.0},
    {"layer": 2, "feature": 1, "firing_rate": 0.1, "strength": 1.0},
    {"layer": 2, "feature": 9, "firing_rate": 0.1, "strength": 4.0},
]
LABELS = {(0, 1): ("medical", "right"), (0, 2): ("medical", "right"), (2, 1): ("other", "-")}


def test_counts_and_shares_by_hand():
    found = feature_categories(ROWS, LABELS)
    shown = [(c.layer, c.relevance, c.correctness, c.features, c.active, c.share) for c in found]
    assert shown == [
        (None, "no label", "-", 1, 1, 0.5),
        (None, "medical", "right", 2, 1, 0.375),
        (None, "other", "-", 1, 1, 0.125),
        (0, "no label", "-", 0, 0, 0.0),
        (0, "medical", "right", 2, 1, 1.0),
        (0, "other", "-", 0, 0, 0.0),
        (2, "no label", "-", 1, 1, 0.8),
        (2, "medical", "right", 0, 0, 0.0),
        (2, "other", "-", 1, 1, 0.2),
    ]


def test_features_that_never_write_have_no_share():
    silent = [row | {"strength": 0.0} for row in ROWS]
    found = feature_categories(silent, LABELS)
    assert all(math.isnan(category.share) for category in found)
    assert {category.to_dict()["share"] for category in found} == {None}


def test_labels_of_a_table_and_of_lines_are_the_same(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufefffeature,layer,who,relevance,correctness\n1,0,me,Medical,right\n2,0,me, medical ,right\n1,2,me,other,-\n"
    )
    lines = tmp_path / "labels.jsonl"
    names = ("layer", "feature", "relevance", "correctness")
    lines.write_text(
        "\n\n".join(
            json.dumps(dict(zip(names, (*place, *label), strict=True))) for place, label in LABELS.items()
        )
    )
    assert read_labels(table) == read_labels(lines) == LABELS


def test_a_judge_sees_each_feature():
    found = judged(ROWS, lambda row: ("medical" if row["layer"] == 0 else "other", "Right"))
    assert found == {
        (0, 1): ("medical", "right"),
        (0, 2): ("medical", "right"),
        (2, 1): ("other", "right"),
        (2, 9): ("other", "right"),
    }
    with pytest.raises(
        ValueError, match=r"judge, feature 0:1: expected \(relevance, correctness\), got 'medical'"
    ):
        judged(ROWS, lambda row: "medical")  # type: ignore[arg-type, return-value]
    with pytest.raises(
        ValueError, match=r"judge: expected a word in 'correctness' \('-' for none\), got None"
    ):
        judged(ROWS, lambda row: ("medical", None))  # type: ignore[arg-type, return-value]


JUDGE = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    row |= {"relevance": "médical" if row["strength"] > 2 else "other", "correctness": "-"}
    print(json.dumps(row))
"""


def test_a_program_judges(tmp_path):
    program = tmp_path / "a judge.py"
    program.write_text(JUDGE, encoding="utf-8")
    found = ask_command(f"{sys.executable} '{program}'", ROWS)
    assert found == {
        (0, 1): ("médical", "-"), (0, 2): ("other", "-"), (2, 1): ("other", "-"), (2, 9): ("médical", "-"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program-here", "judge: expected a program that can be run, got 'no-such-program-here'"),
        ("", "judge: expected a program that can be run, got ''"),
        (f"{sys.executable} -c 'raise SystemExit(\"no key\")'", r"ended with 1: no key"),
        (
            f"{sys.executable} -c 'import sys; sys.stdout.buffer.write(bytes([255]))'",
            "judge: expected UTF-8 from .*, got something else: .* byte 0xff",
        ),
        (f"{sys.executable} -c 'print(1)'", r"judge line 1: expected a JSON object, got '1'"),
        (f"{sys.executable} -c ''", "judge: expected a label for at least one feature, got none"),
    ],
)
def test_programs_that_do_not_judge(command, message):
    with pytest.raises(ValueError, match=message):
        ask_command(command, ROWS)


HEADER = "layer,feature,relevance,correctness\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", "layer,feature,relevance\n", "expected the columns correctness in .*, its header has layer"),
        ("l.csv", "", "expected the columns layer, feature, relevance, correctness in .*, its header has nothing"),
        ("l.csv", HEADER, "expected a label for at least one feature, got none"),
        ("l.csv", HEADER + "0,1,a,b\nx,2,a,b\n", "l.csv line 3: expected a number in 'layer', got 'x'"),
        ("l.csv", HEADER + "0,-1,medical,right\n", "line 2: expected a number >= 0 in 'feature', got -1"),
        ("l.csv", HEADER + "0,1,medical,\n", r"line 2: expected a word in 'correctness' \('-' for none\), got ''"),
        ("l.csv", HEADER + "0,1,medical\n", "line 2: expected a word in 'correctness' .* got None"),
        (
            "l.csv",
            HEADER + "0,1,medical,right\n0,1,medical,wrong\n",
            r"line 3: feature 0:1: expected one label, got \('medical', 'wrong'\) after \('medical', 'right'\)",
        ),
        ("l.jsonl", "{\n", "l.jsonl line 1: expected a JSON object, got '{'"),
        ("l.jsonl", '{"layer": 0}\n', "l.jsonl line 1: expected a number in 'feature', got None"),
        ("l.txt", "", "labels: expected a file that ends in .csv or .jsonl, got l.txt"),
    ],
)  # fmt: skip
def test_files_that_are_no_labels(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name)


def test_files_that_are_not_there_or_not_text(tmp_path):
    for read, what in ((read_labels, "labels"), (read_features, "features")):
        with pytest.raises(ValueError, match=f"{what}: no such file: .*none.jsonl"):
            read(tmp_path / "none.jsonl")
        (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=f"{what}: expected UTF-8 text, .*b.jsonl is not"):
            read(tmp_path / "b.jsonl")


def test_features_that_lack_something(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"layer": 1, "index": 2}\n')
    with pytest.raises(
        ValueError, match=r"f\.jsonl line 2: expected feature, firing_rate, strength, it has layer, index"
    ):
        read_features(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "0"}, "line 2: expected an integer >= 0 in 'layer', got '0'"),
        ({"feature": True}, "line 2: expected an integer >= 0 in 'feature', got True"),
        ({"firing_rate": None}, "line 2: expected a number >= 0 in 'firing_rate', got None"),
        ({"strength": float("nan")}, "line 2: expected a number >= 0 in 'strength', got nan"),
        ({"strength": -1.0}, "line 2: expected a number >= 0 in 'strength', got -1.0"),
        ({"feature": 1}, "line 2: expected each feature once, 0:1 is in line 1 too"),
    ],
)
def test_features_whose_figures_are_none(tmp_path: Path, change, message):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[1] | change)))
    with pytest.raises(ValueError, match=message):
        read_features(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_features(path) == ROWS


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="features: expected at least one, got none"):
        feature_categories([], LABELS)
    with pytest.raises(ValueError, match="labels: expected a label for at least one feature, got none"):
        feature_categories(ROWS, {})
    with pytest.raises(ValueError, match="labels: expected features of the table, got 1 others, first 5:5"):
        feature_categories(ROWS, {**LABELS, (5, 5): ("a", "b")})
