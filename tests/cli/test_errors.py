"""Wrong input is one line and exit code 2, and loses nothing."""

import re
from pathlib import Path

import pytest

from fasttc.nn import TranscoderSet

TRAIN = ("train", "{home}/model", "--out", "{tmp}/o", "--data")
OWN = (*TRAIN, "{home}/text.jsonl")
ATTRIBUTE = ("attribute", "{home}/model", "--out", "{tmp}/g", "--transcoders")
FEATURES = (
    "features",
    "{home}/model",
    "--transcoders",
    "{home}/tcs",
    "--data",
    "{home}/text.jsonl",
    "--out",
    "{tmp}/f",
)
BAD = {
    "no model": (("sample", "{tmp}/nothing"), "nothing"),
    "no data": ((*TRAIN, "{tmp}/no.txt", "--context", "32"), "no such file"),
    "empty data": ((*TRAIN, "{tmp}/empty.txt", "--context", "32"), "is empty"),
    "binary data": ((*TRAIN, "{tmp}/binary.txt", "--context", "32"), "is binary"),
    "k > F": ((*OWN, "--features", "8", "-k", "9"), "k: expected at most n_features = 8, got 9"),
    "missing field": (
        (*OWN, "--context", "32", "--text", "{{body}}"),
        "expected the field 'body' .* it has text",
    ),
    "long context": ((*OWN, "--context", "65"), "context: expected at most the model's 64 positions, got 65"),
    "no transcoders": ((*ATTRIBUTE, "{tmp}", "--prompt", "a"), "in no known format"),
    "two prompts": ((*ATTRIBUTE, "{home}/tcs"), "exactly one of --prompt and --prompt-ids"),
    "prompts and a prompt": (
        (*ATTRIBUTE, "{home}/tcs", "--prompts", "{home}/text.jsonl", "--prompt", "a"),
        "--prompts: expected it alone",
    ),
    "bad ids": ((*ATTRIBUTE, "{home}/tcs", "--prompt-ids", "1,x"), "token ids separated by commas"),
    "long prompt": ((*ATTRIBUTE, "{home}/tcs", "--prompt-ids", "2" + ",2" * 64), "65"),
    "not a graph": (("graph", "prune", "{home}/text.jsonl", "--out", "{tmp}/p"), "text.jsonl"),
    "no graph": (("graph", "export", "{tmp}/none.graph", "--out", "{tmp}/p"), "none.graph"),
    "threshold": (
        ("graph", "prune", "{home}/g.graph", "--out", "{tmp}/p", "--node-threshold", "2"),
        "node_threshold",
    ),
    "which features": (FEATURES, "exactly one of --features, --graph and --all"),
    "bad feature": ((*FEATURES, "--features", "1-2"), "LAYER:INDEX pairs"),
    "device": (("inspect", "{home}/tcs", "--device", "abacus"), "--device: expected cpu, cuda"),
    "resume nothing": ((*OWN, "--context", "32", "--resume"), "o.run"),
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
