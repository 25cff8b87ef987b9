"""Wrong input is one line and exit code 2, and loses nothing."""

import re
from pathlib import Path

import pytest

from fasttc.nn import TranscoderSet

BAD = {
    "no model": (("sample", "{tmp}/nothing"), "nothing"),
    "no data": (
        ("train", "{home}/model", "--data", "{tmp}/no.txt", "--context", "32", "--out", "{tmp}/o"),
        "no such file",
    ),
    "empty data": (
        ("train", "{home}/model", "--data", "{tmp}/empty.txt", "--context", "32", "--out", "{tmp}/o"),
        "is empty",
    ),
    "binary data": (
        ("train", "{home}/model", "--data", "{tmp}/binary.txt", "--context", "32", "--out", "{tmp}/o"),
        "is binary",
    ),
    "k > F": (
        (
            "train",
            "{home}/model",
            "--data",
            "{home}/text.jsonl",
            "--features",
            "8",
            "-k",
            "9",
            "--out",
            "{tmp}/o",
        ),
        "k: expected at most n_features = 8, got 9",
    ),
    "missing field": (
        (
            "train",
            "{home}/model",
            "--data",
            "{home}/text.jsonl",
            "--context",
            "32",
            "--text",
            "{{body}}",
            "--out",
            "{tmp}/o",
        ),
        "expected the field 'body' .* it has text",
    ),
    "long context": (
        ("train", "{home}/model", "--data", "{home}/text.jsonl", "--context", "65", "--out", "{tmp}/o"),
        "context: expected at most the model's 64 positions, got 65",
    ),
    "no transcoders": (
        ("attribute", "{home}/model", "--transcoders", "{tmp}", "--prompt", "a", "--out", "{tmp}/g"),
        "in no known format",
    ),
    "two prompts": (
        ("attribute", "{home}/model", "--transcoders", "{home}/tcs", "--out", "{tmp}/g"),
        "exactly one of --prompt and --prompt-ids",
    ),
    "prompts and a prompt": (
        (
            "attribute",
            "{home}/model",
            "--transcoders",
            "{home}/tcs",
            "--prompts",
            "{home}/text.jsonl",
            "--prompt",
            "a",
            "--out",
            "{tmp}/g",
        ),
        "--prompts: expected it alone",
    ),
    "bad ids": (
        (
            "attribute",
            "{home}/model",
            "--transcoders",
            "{home}/tcs",
            "--prompt-ids",
            "1,x",
            "--out",
            "{tmp}/g",
        ),
        "token ids separated by commas",
    ),
    "long prompt": (
        (
            "attribute",
            "{home}/model",
            "--transcoders",
            "{home}/tcs",
            "--prompt-ids",
            "2" + ",2" * 64,
            "--out",
            "{tmp}/g",
        ),
        "65",
    ),
    "not a graph": (("graph", "prune", "{home}/text.jsonl", "--out", "{tmp}/p"), "text.jsonl"),
    "no graph": (("graph", "export", "{tmp}/none.graph", "--out", "{tmp}/p"), "none.graph"),
    "threshold": (
        ("graph", "prune", "{home}/g.graph", "--out", "{tmp}/p", "--node-threshold", "2"),
        "node_threshold",
    ),
    "which features": (
        (
            "features",
            "{home}/model",
            "--transcoders",
            "{home}/tcs",
            "--data",
            "{home}/text.jsonl",
            "--out",
            "{tmp}/f",
        ),
        "exactly one of --features, --graph and --all",
    ),
    "bad feature": (
        (
            *("features", "{home}/model", "--transcoders", "{home}/tcs", "--data", "{home}/text.jsonl"),
            *("--features", "1-2", "--out", "{tmp}/f"),
        ),
        "LAYER:INDEX pairs",
    ),
    "device": (("inspect", "{home}/tcs", "--device", "abacus"), "--device: expected cpu, cuda"),
    "resume nothing": (
        (
            "train",
            "{home}/model",
            "--data",
            "{home}/text.jsonl",
            "--context",
            "32",
            "--resume",
            "--out",
            "{tmp}/o",
        ),
        "o.run",
    ),
    "unknown option": (("inspect", "{home}/tcs", "--colour"), "No such option"),
    "unknown verb": (("explode",), "No such command"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(fasttc, home: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01" * 50)
    arguments, message = BAD[case]
    code, out, err = fasttc(*(argument.format(home=home, tmp=tmp_path) for argument in arguments))
    assert code == 2, err
    assert out == ""
    assert re.search(message, err), err
    assert "Traceback" not in err
    if "option" not in case and "verb" not in case:
        last = [line for line in err.splitlines() if line.startswith("fasttc:")]
        assert len(last) == 1, err


def test_transcoders_of_another_model_are_refused(fasttc, home: Path, tmp_path: Path) -> None:
    from fasttc.nn import Site, Transcoder

    for name, width, layers in (("width", 32, 4), ("count", 64, 3)):
        made = TranscoderSet(
            [Transcoder(width, 16, k=2) for _ in range(layers)], [Site(i) for i in range(layers)]
        )
        made.save_pretrained(tmp_path / name)
        code, _, err = fasttc(
            "attribute",
            home / "model",
            "--transcoders",
            tmp_path / name,
            "--prompt",
            "a",
            "--out",
            tmp_path / "g",
        )
        assert code == 2
        assert ("32" in err and "64" in err) if name == "width" else ("3" in err and "4" in err), err
    assert not (tmp_path / "g").exists()


def test_debug_shows_the_traceback(home: Path, tmp_path: Path) -> None:
    from fasttc.cli.__main__ import main

    with pytest.raises(ValueError, match="no known format"):
        main(["inspect", str(tmp_path), "--debug"])


def test_full_disk_keeps_what_was_there(
    fasttc, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "p.graph"
    fasttc("graph", "prune", home / "g.graph", "--out", target)
    before = target.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttc.graph._io.save_file", full)
    code, _, err = fasttc("graph", "prune", home / "g.graph", "--out", target, "--node-threshold", 0.5)
    assert code == 2
    assert "No space left" in err
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.graph"]
