"""Questions on the command line: before and after fine-tuning, alone, and with transcoders in place."""

import json

import pytest


@pytest.fixture
def task(tmp_path):
    words = ["fever", "cough", "rash", "pain"]
    lines = [
        json.dumps({"q": f"{words[i % 4]} {words[(i + 1) % 4]}", "a": ("yes", "no")[i % 2]})
        for i in range(40)
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))
    return tmp_path / "qa.jsonl"


def test_finetune_asks_before_and_after(fasttc, home, task, tmp_path):
    asked = ("--prompt", "{q}", "--answer", "{a}", "--task", task, "--options", "yes,no")
    size = ("--context", 32, "--batch-size", 4, "--tokens", 300, "--lr", 1e-3)
    code, shown, err = fasttc(
        "finetune", home / "model", "--data", task, *asked, *size, "--out", tmp_path / "ft", "--json"
    )
    assert code == 0, err
    report = json.loads(shown)
    assert report["task_before"]["questions"] == report["task_after"]["questions"] == 40
    assert report["config"]["prompt"] == "{q}"
    code, shown, err = fasttc("evaluate", home / "model", *asked, "--transcoders", home / "tcs")
    assert code == 0, err
    assert "accuracy" in shown


def test_what_a_task_needs(fasttc, home, task):
    code, _, err = fasttc("evaluate", home / "model", "--task", task)
    assert code == 2
    assert "--task: expected --prompt and --answer" in err
    code, _, err = fasttc("evaluate", home / "model")
    assert code == 2
    assert "expected one of --data and --task, got none" in err
    asked = ("--prompt", "{q}", "--answer", "{a}", "--task", task, "--options", "yes,no,maybe")
    code, _, err = fasttc("evaluate", home / "model", *asked)
    assert code == 2
    assert "expected questions of every class, got none for maybe" in err
