"""Options that a verb only hands on reach the library, under their names, with their types."""

import json

import pytest

OUT = ("--out", "{out}")
TEXT = ("--data", "{home}/text.jsonl", "--context", "32")
MODEL, TCS = "{home}/model", ("--transcoders", "{home}/tcs")
PAIR = (MODEL, "--base", MODEL)
RATE = ("--warmup", "0.1", "--decay", "linear", "--clip", "0.5", "--checkpoint-every", "7")
RATE_GIVEN = {"warmup": 0.1, "decay": "linear", "clip": 0.5, "checkpoint_every": 7}
PROMPT = ("--prompt-ids", "1,2,3")

CASES = {  # what is typed -> the function that gets it, what it gets
    "train": (
        ("train", MODEL, *TEXT, *OUT, "--features", "64", "-k", "4", "--skip", "--patience", "3", *RATE),
        "fasttc.training.train",
        {"skip": True, "patience": 3, **RATE_GIVEN},
    ),
    "adapt": (
        ("adapt", MODEL, *TCS, *TEXT, *OUT, "--train", "W_dec", "--train", "b_dec", "--target-l0", "3.5", *RATE),
        "fasttc.training.adapt",
        {"train": ("W_dec", "b_dec"), "train_threshold": False, "target_l0": 3.5, **RATE_GIVEN},
    ),
    "adapt thresholds": (
        ("adapt", MODEL, *TCS, *TEXT, *OUT, "--train-threshold", "--refit", "none"),
        "fasttc.training.adapt",
        {"train": None, "train_threshold": True, "target_l0": None, "refit": None},
    ),
    "finetune lora": (
        ("finetune", MODEL, *TEXT, *OUT, "--parameters", "lora", "--lora-rank", "2", "--lora-alpha", "3", *RATE),
        "fasttc.training.finetune",
        {"parameters": "lora", "lora_rank": 2, "lora_alpha": 3.0, **RATE_GIVEN},
    ),
    "finetune": (
        ("finetune", MODEL, *TEXT, *OUT, "--checkpointing", "--optimiser", "adamw8bit", "--weight-decay", "0.1",
         "--prompt", "{{q}}", "--answer", "{{a}}", "--chat"),
        "fasttc.training.finetune",
        {"checkpointing": True, "optimiser": "adamw8bit", "weight_decay": 0.1, "prompt": "{q}", "answer": "{a}",
         "chat": True},
    ),
    "adapter train": (
        ("adapter", "train", *PAIR, *TEXT, *OUT, "--l1", "0.01", "--l1-ramp", "0.3", "--bridge", "0", "--loss", "lm",
         "--bias-only", *RATE),
        "fasttc.training.train_adapters",
        {"l1": 0.01, "l1_ramp": 0.3, "bridge": 0.0, "loss": "lm", "bias_only": True, **RATE_GIVEN},
    ),
    "evaluate": (
        ("evaluate", MODEL, *TCS, *TEXT, "--split", "train", "--tokens", "0", "--all-layers-only"),
        "fasttc.evaluation.evaluate",
        {"split": "train", "tokens": None, "per_layer": False},
    ),
    "evaluate a task": (
        ("evaluate", MODEL, "--task", "{home}/text.jsonl", "--prompt", "{{text}}", "--answer", "{{text}}",
         "--normalise", "tokens", "--max-new-tokens", "5", "--chat"),
        "fasttc.evaluation.evaluate_task",
        {"normalise": "tokens", "max_new_tokens": 5, "chat": True},
    ),
    "attribute": (
        ("attribute", MODEL, *TCS, *PROMPT, *OUT, "--logit-prob", "0.5", "--max-feature-nodes", "9", "--edge-share",
         "0.9", "--memory", "0.5", "--target", "17"),
        "fasttc.attribution.attribute_many",
        {"logit_prob": 0.5, "max_feature_nodes": 9, "edge_share": 0.9, "memory_budget": 2**29, "targets": ["17"]},
    ),
    "intervene": (
        ("intervene", MODEL, *TCS, *PROMPT, "--feature", "0/1", "--generate", "3", "--temperature", "0.7"),
        "fasttc.attribution.intervene",
        {"max_new_tokens": 3, "generation": {"do_sample": True, "temperature": 0.7}},
    ),
    "sample": (
        ("sample", MODEL, *PROMPT, "--temperature", "0.3", "--tokens", "9", "-n", "2"),
        "fasttc.models.sample",
        {"temperature": 0.3, "max_tokens": 9, "n": 2},
    ),
    "adapter generate": (
        ("adapter", "generate", *PAIR, *PROMPT, "--temperature", "0.3", "--tokens", "9", "-n", "2"),
        "fasttc.models.sample",
        {"temperature": 0.3, "max_tokens": 9, "n": 2},
    ),
    "features": (
        ("features", MODEL, *TCS, *TEXT, *OUT, "--features", "0:1", "--split", "validation", "--examples", "3"),
        "fasttc.analysis.feature_evidence",
        {"split": "validation", "examples": 3, "sampled": 3},
    ),
    "shift": (
        ("shift", MODEL, "--base", MODEL, *TEXT, "--text", "{{text}}", "--class", "{{text}}", "--per-class", "4"),
        "fasttc.analysis.representation_shift",
        {"per_class": 4},
    ),
    "graph diff": (
        ("graph", "diff", "{home}/g.graph", "{home}/g.graph", "--least-change", "0.25", "-k", "2"),
        "fasttc.graph.diff",
        {"least_change": 0.25, "paths": 2},
    ),
    "graph paths": (
        ("graph", "paths", "{home}/g.graph", "--logit", "1"),
        "fasttc.graph.strongest_paths",
        {"logit": 1, "avoiding": []},
    ),
}  # fmt: skip


class Reached(Exception):
    """The library was called; nothing more is wanted of the verb."""


@pytest.mark.parametrize("case", CASES)
def test_options_are_handed_on(case, fasttc, home, tmp_path, monkeypatch):
    words, name, expected = CASES[case]
    got: dict[str, object] = {}

    def record(*_: object, **given: object) -> None:
        got.update(given)
        raise Reached

    monkeypatch.setattr(name, record)
    with pytest.raises(Reached):
        pytest.fail(str(fasttc(*(word.format(home=home, out=tmp_path / "out") for word in words))))
    assert {key: got.get(key, "not given") for key in expected} == expected


def test_bounds_of_a_merge_and_thresholds_of_pruning_move_what_is_kept(fasttc, home, tmp_path):
    def supernodes(*bounds: str) -> int:
        code, out, err = fasttc("graph", "merge", home / "g.graph", "--json", *bounds)
        assert code == 0, err
        return json.loads(out)["loss"]["nodes_after"]

    loosest = supernodes("--budget", "1", "--min-agreement", "0", "--min-edges", "0")
    assert loosest < supernodes("--budget", "1", "--min-agreement", "1", "--min-edges", "0")
    assert loosest < supernodes("--budget", "1", "--min-agreement", "0", "--min-edges", "1")


def test_edge_threshold_of_pruning(fasttc, home, tmp_path):
    def edges(threshold: float) -> int:
        code, out, err = fasttc(
            "graph",
            "prune",
            home / "g.graph",
            "--json",
            "--edge-threshold",
            threshold,
            "--out",
            tmp_path / "p.graph",
        )
        assert code == 0, err
        return json.loads(out)["after"]["edges"]

    assert edges(0.5) < edges(1.0)


def test_an_export_has_the_names_that_were_asked_for(fasttc, home, tmp_path):
    code, _, err = fasttc(
        "graph", "export", home / "g.graph", "--out", tmp_path, "--slug", "mine", "--scan", "our-model"
    )
    assert code == 0, err
    metadata = json.loads((tmp_path / "mine.json").read_text())["metadata"]
    assert (metadata["slug"], metadata["scan"]) == ("mine", "our-model")
