"""``fasttc intervene``."""

import json
import re
from pathlib import Path

import pytest

from fasttc.cli.intervene import parse_feature
from fasttc.graph import Graph


@pytest.fixture
def call(fasttc, home: Path):
    def run(*arguments: object) -> tuple[int, str, str]:
        prompt = () if "--prompt-ids" in arguments else ("--prompt", Graph.load(home / "g.graph").prompt)
        return fasttc("intervene", home / "model", "--transcoders", home / "tcs", *prompt, *arguments)

    return run


def test_tables_and_json_say_the_same(call, home: Path) -> None:
    layer, position, index = Graph.load(home / "g.graph").features[3].tolist()
    which = f"{layer}/{index}@{position}:"
    code, shown, _ = call("--feature", which, "--scale", -2, "--generate", 3, "--top", 4, "--json")
    assert code == 0
    chosen = json.loads(shown)["chosen"]
    assert chosen["kl"] > 0
    assert len(chosen["tokens"]) == 4
    assert chosen["features"][0].keys() == {"layer", "position", "feature", "before", "after"}
    assert len(chosen["generated"]["after"].split()) <= 3
    code, shown, _ = call("--feature", which, "--scale", -2, "--generate", 3, "--top", 4)
    assert code == 0
    assert f"KL of the next token {chosen['kl']:.4g}" in shown
    assert f"after:  {chosen['generated']['after']!r}" in shown


def test_control_and_steering(call, home: Path) -> None:
    layer, _, index = Graph.load(home / "g.graph").features[3].tolist()
    arguments = ("--feature", f"{layer}/{index}", "--add", 3, "--control", "--match", home / "text.jsonl")
    code, shown, _ = call(*arguments, "--json", "--seed", 4)
    assert code == 0
    found = json.loads(shown)
    assert found["chosen"]["interventions"] != found["random"]["interventions"]
    code, shown, _ = call("--negate", 0.5, "--freeze-attention", "--freeze-norms", "--constrain", "1:2")
    assert code == 0
    assert "chosen features: KL" in shown


@pytest.mark.parametrize(
    ("text", "features", "positions"),
    [
        ("3/17", (17,), None),
        ("3/17,4@5", (17, 4), (5,)),
        ("3/all@-2,1", None, (-2, 1)),
        ("3/17@4:", (17,), slice(4, None)),
        ("3/17@-3:-1", (17,), slice(-3, -1)),
    ],
)
def test_features_as_text(text: str, features, positions) -> None:
    found = parse_feature(text, "scale", 2.0)
    assert (found.layer, found.features, found.positions, found.action, found.value) == (
        3, features, positions, "scale", 2.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of --feature and --negate"),
        (("--feature", "3-1"), r"--feature: expected LAYER/INDEX.* got '3-1'"),
        (("--feature", "3/1@4:5:6"), "--feature: expected positions"),
        (("--feature", "9/1"), r"expected a layer of the transcoders \[0, 1, 2, 3\], got 9"),
        (("--feature", "1/1", "--set", 1, "--add", 1), "at most one of --set, --scale and --add, got 2"),
        (("--negate", 1, "--scale", 2), "expected --negate alone"),
        (("--feature", "1/1", "--constrain", "3:1"), "--constrain: expected FIRST:LAST"),
        (("--feature", "1/1", "--prompt-ids", "2,x"), "token ids separated by commas"),
    ],
)
def test_bad_input(call, arguments, message: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
