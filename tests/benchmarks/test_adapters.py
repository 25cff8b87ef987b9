"""The benchmarks of adapters and of shift: their questions, and tables that show every seed."""

import pytest

from fasttc.benchmarks import record, report
from fasttc.benchmarks.adapters import report as adapters_report
from fasttc.benchmarks.adapters import suite as adapters
from fasttc.benchmarks.circuits import shift


def row(pair: str, seed: int, kl: float, *, words: bool) -> dict:
    quality = {"kl": kl, "top1_error": 0.5, "l0": [1.0 + seed, 3.0], "mean_l0": 2.0 + seed / 2}
    one = {"adapted": quality, "hybrid": {**quality, "kl": 2.0}, "kl_recovered": 1 - kl / 2}
    scores = {"target": 0.9, "hybrid": 0.5, "adapted": 0.8, "recovered": 0.75}
    found = {
        "pair": pair, "seed": seed, "plan": {"features": 7}, "bias_only": one, "adapters": one,
        "recovery": {"accuracy": scores, "response tokens": {**scores, "target": 120.25}},
    }  # fmt: skip
    figures = {
        "target": 5.0,
        "hybrid": 0.0,
        "adapted": 4.0,
        "ablated": 1.0,
        "change": 3.0,
        "percentile_95": 1.5,
    }
    return found | ({"words": {**figures, "control_changes": [1.0, 0.25]}} if words else {})


def test_tables_show_the_least_and_the_greatest_of_the_seeds():
    text = adapters_report.tables(
        [row("A", 0, 0.5, words=True), row("A", 1, 0.25, words=True), row("B", 0, 1.0, words=False)]
    )
    for line in (
        "| A | none (hybrid) | 2.0000 | - | 50.0 % | - |",
        "| A | F = 7 | 0.2500 to 0.5000 | 75.0 to 87.5 % | 50.0 % | 2.00 to 2.50 (1.5, 3.0) |",
        "| B | biases only | 1.0000 | 50.0 % | 50.0 % | 2.00 (1.0, 3.0) |",
        "| A | accuracy | 90.0 % | 50.0 % | 80.0 % | 75.0 % |",
        "| B | response tokens | 120.2 | 0.5 | 0.8 | 75.0 % |",
        "| A | 1 | 5.0 | 0.0 | 4.0 | 1.0 | 3.0 | 1.5 | 0.2, 1.0 |",
    ):
        assert line in text
    assert "| B | 0 |" not in text


def test_questions_about_the_order_of_words():
    documents = [" ".join(f"w{i}" for i in range(35)), "one two three", "same " * 40]
    questions = adapters.word_orders(documents, 10)
    assert questions == adapters.word_orders(documents, 10)
    assert sorted(q.answer.split()[0] for q in questions) == ["w10", "w20"]
    for question in questions:
        assert len(set(question.options)) == 4
        assert {tuple(sorted(option.split())) for option in question.options} == {
            tuple(sorted(question.answer.split()))
        }
        assert question.prompt.split()[-1] == f"w{int(question.answer.split()[0][1:]) - 1}"
    assert len(adapters.word_orders(documents, 1)) == 1


def test_shift_by_group_at_the_last_layer(tmp_path):
    figures = {"own": 1.0, "own_by_chance": 0.5, "cosine": 0.9, "least": 2.0, "most": 4.0, "classes": 6}
    rows = [
        {"seed": seed, "layer": layer, "group": group, "shift": 3.0 + seed + 10 * (2 - layer), **figures}
        for seed in (0, 1)
        for layer in (1, 2)
        for group in shift.GROUPS
    ]
    assert "| rare | 6 | 3.00 to 4.00 | 2.0 to 4.0 | 1.00 | 0.50 | 0.90 |" in shift.table(rows)
    record.write(
        tmp_path / "shift.json", {"kind": "shift", "environment": record.environment("cpu", 0)}, rows
    )
    text = report.rendered("<!-- benchmarks:shift -->\n<!-- /benchmarks:shift -->", tmp_path)
    assert "shift at layer 2" in text
    assert "seeds 0 to 1." in text


def test_wrong_arguments(tmp_path, capsys):
    for words, message in (
        (["--data", str(tmp_path)], "--data: expected a folder with models/stories260K"),
        (["--pair", "none"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            adapters.main(words)
        assert message in capsys.readouterr().err
    (tmp_path / "models/stories260K").mkdir(parents=True)
    with pytest.raises(SystemExit):
        adapters.main(["--data", str(tmp_path), "--jobs", "0"])
    assert "--jobs: expected at least 1, got 0" in capsys.readouterr().err
