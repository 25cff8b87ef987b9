"""What the documents say exists: files that are linked to, options of commands, names in Python examples."""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import fasttc
from fasttc.cli.__main__ import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(script: str) -> Iterator[list[str]]:
    """The words after ``fasttc`` in every call of it; here-documents and comments are left out."""
    script = re.sub(r"<<'(\w+)'.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL)
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for start, word in enumerate(words):
            if word == "fasttc" and (start == 0 or words[start - 1] in ("$", "&&", "-m", ";", "|")):
                rest = words[start + 1 :]
                yield rest[: next((i for i, w in enumerate(rest) if w in ("&&", "|", ";", ">")), len(rest))]


def fault(words: list[str]) -> str | None:
    """What is wrong with a call of ``fasttc``, if anything: a verb or an option that does not exist."""
    command: click.Command = cli
    context = click.Context(command)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return f"no verb {rest[0]!r}"
        command, context = found, click.Context(found, parent=context)
        rest.pop(0)
    if command.context_settings.get("ignore_unknown_options"):
        return None
    known = {option for p in command.get_params(context) for option in (*p.opts, *p.secondary_opts)}
    used = [word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return next((f"no option {option!r}" for option in used if option not in known), None)


def missing(link: str, page: Path) -> bool:
    target = link.split("#")[0]
    return bool(target) and "://" not in link and not (page.parent / target).exists()


def unknown_names(source: str) -> list[str]:
    """Names taken from fasttc that it does not have."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fasttc":
            module = importlib.import_module(node.module or "")
            wrong += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if (
                parts[0] == "fasttc"
                and all(part.isidentifier() for part in parts)
                and not resolves(parts[1:])
            ):
                wrong.append(".".join(parts))
    return wrong


def resolves(parts: list[str]) -> bool:
    value: object = fasttc
    name = "fasttc"
    for part in parts:
        name = f"{name}.{part}"
        if not hasattr(value, part):
            try:
                value = importlib.import_module(name)
            except ImportError:
                return False
        else:
            value = getattr(value, part)
    return True


@by_page
def test_relative_links_lead_to_files(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if missing(link, page)]
    assert not broken, f"{page.name}: {broken}"


@by_page
def test_commands_use_options_that_exist(page: Path) -> None:
    shown = [line for body in fences(page, "") for line in body.splitlines() if line.startswith("$ ")]
    calls = [call for body in (*fences(page, "bash"), *shown) for call in commands(body)]
    faults = [f"fasttc {shlex.join(call)}: {wrong}" for call in calls if (wrong := fault(call))]
    assert not faults, "\n".join(faults)


@by_page
def test_python_examples_use_names_that_exist(page: Path) -> None:
    assert not [name for body in fences(page, "python") for name in unknown_names(body)]


def test_numbers_of_design_notes_are_unique() -> None:
    numbers = [path.name[:4] for path in (ROOT / "docs/design").glob("[0-9]*.md")]
    assert numbers
    assert len(set(numbers)) == len(numbers), sorted(numbers)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {
        re.split(r"[\W]", text.replace("-", "_"))[0] for text in sum(extras.values(), project["dependencies"])
    }
    page = (ROOT / "docs/design/dependencies.md").read_text(encoding="utf-8").replace("-", "_")
    assert not {name for name in asked - {"fasttc"} if not re.search(rf"\b{name}\b", page)}
    assert not [extra for extra in extras if f"| `{extra}` |" not in page]


def test_a_fault_would_be_seen() -> None:
    assert missing("nowhere.md#part", ROOT / "README.md")
    assert not missing("README.md#start", ROOT / "README.md")
    assert fault(["trian", "M"]) == "no verb 'trian'"
    assert fault(["graph", "prune", "g", "--nothing", "1"]) == "no option '--nothing'"
    assert fault(["graph", "prune", "g", "--out", "h"]) is None
    script = (
        "pip install x && fasttc demo \\\n  --seed 1  # fasttc nothing\ntorchrun -m fasttc train M --out T\n"
    )
    assert list(commands(script)) == [["demo", "--seed", "1"], ["train", "M", "--out", "T"]]
    assert unknown_names("import fasttc\nfasttc.nothing(1)\nfasttc.models.load('m')") == ["fasttc.nothing"]
    assert unknown_names("from fasttc.training import nothing, finetune") == ["fasttc.training.nothing"]
