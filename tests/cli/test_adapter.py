"""``fasttc adapter``: train, evaluate, generate, what features stand for, and wrong input as one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fasttc.cli.__main__ import main
from fasttc.worlds import ClinicalWorld

SMALL = ("--context", "32", "--batch-size", "4")


@pytest.fixture(scope="module")
def pair(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fine-tuned model and adapters between it and ``home / "model"``, made by the commands."""
    folder = tmp_path_factory.mktemp("pair")
    tuned, adapters = folder / "ft", folder / "adapters"
    text = ("--data", home / "text.jsonl", *SMALL, "--tokens", 600)
    train = ("adapter", "train", tuned, "--base", home / "model", *text, "--features", 16, "--l1", 0)
    for command in (
        ("finetune", home / "model", *text, "--lr", 1e-2, "--out", tuned),
        (*train, "--lr", 1e-2, "--out", adapters),
    ):
        main([str(word) for word in command])
    return tuned, adapters


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Two prompts of the world with the answer and three other drugs."""
    world, path = ClinicalWorld(), tmp_path / "task.jsonl"
    drugs = sorted(set(world.drugs["base"]))
    rows = [
        {
            "prompt": p.text,
            "answer": p.answer,
            "options": [p.answer, *(d for d in drugs if d != p.answer)][:4],
        }
        for p in world.prompts("two_hop", 3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_train_under_torchrun_is_refused_at_once(fasttc, home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("--base", "nowhere", "--data", "nowhere.txt", "--out", tmp_path / "a")
    code, _, err = fasttc("adapter", "train", "nowhere", *words)
    assert code == 2
    assert err.splitlines()[1:] == [
        "fasttc: expected one process, torchrun started 2: call this verb without it"
    ]


def test_evaluate(fasttc, home: Path, pair: tuple[Path, Path], task: Path, tmp_path: Path) -> None:
    words = ("--base", home / "model", "--adapters", pair[1], "--data", home / "text.jsonl", *SMALL)
    command = ("adapter", "evaluate", pair[0], *words, "--tokens", 200)
    code, shown, error = fasttc(*command, "--plot", tmp_path / "a.svg", "--json")
    assert code == 0, error
    assert "layer alone" in (tmp_path / "a.svg").read_text()
    assert len(json.loads(shown)["single_adapted_kl"]) == 4
    assert "recovery" not in json.loads(shown)
    asked = ("--task", task, "--prompt", "{prompt}", "--answer", "{answer}", "--all-layers-only")
    code, shown, error = fasttc(*command, *asked, "--options", "{options}", "--json")
    assert code == 0, error
    found = json.loads(shown)["recovery"]
    assert list(found) == ["accuracy"]
    assert set(found["accuracy"]) == {"target", "hybrid", "adapted", "recovered"}
    code, _, error = fasttc(*command, "--responses", 4, "--response-tokens", 6)
    assert code == 2
    assert "expected one with an end-of-text token" in error


def test_length_of_responses(fasttc, home: Path, pair: tuple[Path, Path], task: Path, tmp_path: Path) -> None:
    """With a full stop for the end of a text: its tokens are counted up to there."""
    models = [tmp_path / name for name in ("target", "base")]
    for source, copy in zip((pair[0], home / "model"), models, strict=True):
        shutil.copytree(source, copy)
        config = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "."}))
    command = (
        *("adapter", "evaluate", models[0], "--base", models[1], "--adapters", pair[1], "--all-layers-only"),
        *("--data", home / "text.jsonl", *SMALL, "--tokens", 200),
        *("--responses", 5, "--response-tokens", 6),
    )
    asked = ("--task", task, "--prompt", "{prompt}", "--answer", "{answer}", "--max-new-tokens", 2)
    for words, names in (
        ((), ["response tokens"]),
        (asked, ["accuracy", "word F1", "response tokens"]),
    ):
        code, shown, error = fasttc(*command, *words)
        assert code == 0, error
        assert "response tokens" in shown
        code, shown, error = fasttc(*command, *words, "--json")
        assert code == 0, error
        found = json.loads(shown)["recovery"]
        assert list(found) == names
        assert all(0 <= found["response tokens"][name] <= 6 for name in ("target", "hybrid", "adapted"))
        code, _, error = fasttc(*command, *words, "--response-tokens", 10_000)
        assert code == 2
        assert "--response-tokens: expected fewer than the model's" in error


def test_generate(fasttc, home: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every way to change features writes another text, and two names of one change the same."""
    tuned, out = pair
    (tmp_path / "some.txt").write_text("0:1 0:2\n3:2,1:5")
    some, every = f"@{tmp_path / 'some.txt'}", ",".join(f"{la}:{f}" for la in range(4) for f in range(16))

    def write(*words: object) -> list[int]:
        start = () if "--prompt" in words else ("--prompt-ids", "1,5,9")
        command = ("adapter", "generate", tuned, *words, *start, "--tokens", 24, "--json")
        code, shown, error = fasttc(*command)
        assert code == 0, error
        return json.loads(shown)["input_ids"][0]

    adapted = ("--base", home / "model", "--adapters", out)
    plain = write(*adapted)
    assert plain == write(*adapted, "--scale", f"{every}=1") == write(*adapted, "--only", every)
    off = write(*adapted, "--ablate", every)
    assert plain != off == write(*adapted, "--scale", f"{every}=0")
    assert write(*adapted, "--only", some) == write(*adapted, "--only", "1:5,0:2,3:2,0:1")
    turned = write(*adapted, "--scale", f"{every}=-1")
    assert turned not in (plain, off)
    assert turned == write(*adapted, "--scale", f"{every}=-2", "--scale", f"{every}=0.5")
    assert write("--steer", 0, "--adapters", out) == write("--steer", 0, "--adapters", out, "--ablate", every)
    assert write("--steer", -2, "--adapters", out) != write("--steer", 0, "--adapters", out)
    assert write(*adapted, "--prompt", "a woman with")[:2] == [1, 2]
    write("--base", home / "model")


BAD = {
    "nothing to change": (("--base", "{base}", "--ablate", "0:1"), "expected --adapters with them, got none"),
    "no pairs": (
        ("--base", "{base}", "--adapters", "{out}", "--ablate", "0"),
        "--ablate: expected LAYER:INDEX pairs (0:12,3:7) or @FILE, got '0'",
    ),
    "none": (
        ("--base", "{base}", "--adapters", "{out}", "--only", ","),
        "--only: expected LAYER:INDEX pairs",
    ),
    "no file": (("--base", "{base}", "--adapters", "{out}", "--only", "@none"), "there is no file none"),
    "no factor": (
        ("--base", "{base}", "--adapters", "{out}", "--scale", "0:1"),
        "--scale: expected FEATURES=FACTOR (0:12,3:7=4), got '0:1'",
    ),
    "not a number": (
        ("--base", "{base}", "--adapters", "{out}", "--scale", "0:1=nan"),
        "factor: expected a finite number, got nan",
    ),
    "endless": (("--adapters", "{out}", "--steer", "inf"), "factor: expected a finite number, got inf"),
    "no such feature": (
        ("--base", "{base}", "--adapters", "{out}", "--scale", "0:16=2"),
        "features: expected (layer, feature) of",
    ),
    "no adapters": (("--base", "{base}", "--adapters", "{home}/tcs"), "expected a set of adapters"),
    "both": (
        ("--base", "{base}", "--adapters", "{out}", "--steer", "1"),
        "exactly one of --base and --steer",
    ),
    "neither": (("--adapters", "{out}"), "expected exactly one of --base and --steer"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line(fasttc, home: Path, pair: tuple[Path, Path], case: str) -> None:
    words, message = BAD[case]
    places = {"home": home, "base": home / "model", "out": pair[1]}
    command = ("adapter", "generate", pair[0], *(word.format(**places) for word in words))
    code, _, error = fasttc(*command, "--prompt-ids", "2,5", "--tokens", 8)
    assert code == 2
    assert message in error


def test_what_features_stand_for_and_their_categories(
    fasttc, home: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    lines, labels = tmp_path / "f.jsonl", tmp_path / "labels.csv"
    text = ("--data", home / "text.jsonl", "--context", 32, "--tokens", 500)
    looked = ("features", pair[0], "--adapters", pair[1], *text, "--format", "lines", "--all")
    code, shown, error = fasttc(*looked, "--base", home / "model", "--out", lines, "--json")
    assert code == 0, error
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{la}:{f}" for la in range(4) for f in range(16)]
    alive = next(row for row in rows if row["examples"])
    assert alive["examples"][0]["text"].count("«") == 1
    labels.write_text("layer,feature,relevance,correctness\n0,1,medical,right\n3,2,other,-\n")
    keep = tmp_path / "kept.jsonl"
    again = tmp_path / "again.jsonl"  # of another model, which lacks a labelled feature
    again.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["id"] != "3:2"))
    code, shown, error = fasttc("categories", lines, again, "--labels", labels, "--keep", keep)
    assert code == 0, error
    assert shown.count("features and share of each layer's strength") == 2
    kept = keep.read_text()
    assert kept.count("\n") == 2
    judge = f"{sys.executable} -c 'print(open(\"{keep}\").read())'"
    code, judged, error = fasttc("categories", lines, "--judge", judge, "--json")
    assert code == 0, error
    first = json.loads(judged)["categories"][str(lines)][0]
    said = tmp_path / "said.jsonl"
    code, _, error = fasttc("categories", again, "--judge", judge, "--keep", said)
    assert (code, said.read_text()) == (2, kept), "what a judge said is kept whatever becomes of it"
    assert "expected features of the table, got 1 others" in error
    assert (first["relevance"], first["features"]) == ("no label", 62)
    for words, message in (
        ((*looked, "--out", lines), "expected --adapters and --base together"),
        (
            (*looked, "--transcoders", home / "tcs", "--out", lines),
            "exactly one of --transcoders and --adapters",
        ),
        ((*looked, "--base", home / "model", "--out", tmp_path), "--out: expected a file for --format lines"),
        (("categories", lines), "expected exactly one of --labels and --judge"),
    ):
        code, _, error = fasttc(*words)
        assert code == 2
        assert message in error


def test_shift_of_classes(fasttc, home: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    world, data = ClinicalWorld(), tmp_path / "classes.jsonl"
    prompts = [p for p in world.prompts("two_hop", 60) if p.disease < 3]
    rows = [{"vignette": p.text, "disease": world.values["disease"][p.disease]} for p in prompts]
    data.write_text("\n".join(map(json.dumps, rows)))
    command = ("shift", pair[0], "--base", home / "model", "--data", data, "--class", "{disease}")
    command = (*command, "--text", "{vignette}", "--context", 32)
    code, shown, error = fasttc(*command, "--plot", tmp_path / "s.svg")
    assert code == 0, error
    assert "own, by chance" in shown
    assert "layer 4" in (tmp_path / "s.svg").read_text()
    code, shown, error = fasttc(*command, "--pool", "last", "--layer", 2, "--json")
    assert code == 0, error
    layers = json.loads(shown)["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3, 4]
    assert {one["shift"] for one in layers[1]["classes"]} != {0}
    code, _, error = fasttc(*command, "--layer", 5)
    assert code == 2
    assert "--layer: expected at most 4, which the final norm reads, got 5" in error


def test_inspect(fasttc, pair: tuple[Path, Path]) -> None:
    code, shown, _ = fasttc("inspect", pair[1])
    assert code == 0
    assert "adapter set, format fasttc" in shown
