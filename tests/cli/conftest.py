"""A small model on disk, with text, transcoders and a graph, made once by the commands themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fasttc.cli.__main__ import main
from fasttc.models.build import build_causal_lm
from fasttc.worlds import CLINICAL_MODEL, ClinicalWorld

SMALL = ("--context", "32", "--batch-size", "4")


@pytest.fixture
def fasttc(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model`` (random, untrained), ``text.jsonl`` and, made by the commands, ``tcs`` and ``g.graph``."""
    folder = tmp_path_factory.mktemp("home")
    world = ClinicalWorld()
    model, tokenizer = build_causal_lm(CLINICAL_MODEL, world.vocabulary)
    with torch.no_grad():  # larger weights than at the start of a training: features differ from one another
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"text": document}) for document in world.base_corpus(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    text = ("--data", folder / "text.jsonl", *SMALL)
    train = (
        "train",
        folder / "model",
        *text,
        "--features",
        64,
        "-k",
        4,
        "--tokens",
        2000,
        "--out",
        folder / "tcs",
    )
    graph = ("--prompt", world.prompts("two_hop", 1)[0].text, "--out", folder / "g.graph")
    for command in (train, ("attribute", folder / "model", "--transcoders", folder / "tcs", *graph)):
        main([str(argument) for argument in command])
    return folder
