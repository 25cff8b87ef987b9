"""``fasttc adapter``: train, evaluate, generate, and wrong input as one line."""

import json
from pathlib import Path

SMALL = ("--context", "32", "--batch-size", "4")


def test_train_evaluate_generate(fasttc, home: Path, tmp_path: Path) -> None:
    model, text = home / "model", ("--data", home / "text.jsonl", *SMALL)
    tuned, out = tmp_path / "ft", tmp_path / "adapters"
    assert fasttc("finetune", model, *text, "--tokens", 600, "--lr", 1e-2, "--out", tuned)[0] == 0
    pair = (tuned, "--base", model)
    code, _, error = fasttc(
        "adapter", "train", *pair, *text, "--features", 16, "--tokens", 600, "--out", out, "--json"
    )
    assert code == 0, error
    evaluate = ("adapter", "evaluate", *pair, "--adapters", out, *text, "--tokens", 200)
    code, shown, _ = fasttc(*evaluate, "--plot", tmp_path / "a.svg", "--json")
    assert code == 0
    assert "layer alone" in (tmp_path / "a.svg").read_text()
    assert len(json.loads(shown)["single_adapted_kl"]) == 4
    write = ("adapter", "generate", *pair, "--prompt-ids", "2,5", "--tokens", 8)
    for extra in (
        (),
        ("--adapters", out),
        ("--adapters", out, "--ablate", "0:1,3:2"),
        ("--adapters", out, "--only", "0:1"),
    ):
        assert fasttc(*write, *extra)[0] == 0
    for extra, message in (
        (("--ablate", "0:1"), "--ablate and --only: expected --adapters with them, got none"),
        (("--adapters", out, "--ablate", "0"), "--ablate: expected LAYER:INDEX pairs (0:12,3:7), got '0'"),
        (
            ("--adapters", out, "--ablate", "0:1", "--only", "0:2"),
            "expected one of --ablate and --only, got both",
        ),
        (("--adapters", home / "tcs"), "expected a set of adapters"),
    ):
        code, _, error = fasttc(*write, *extra)
        assert code == 2
        assert message in error
    code, shown, _ = fasttc("inspect", out)
    assert code == 0
    assert "adapter set, format fasttc" in shown
