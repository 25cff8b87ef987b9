"""One direction of flow: every layer imports only from the layers above it in the table of the architecture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Highest first. A file may import its own layer and those before it. Layers in one tuple are equals that do not
# know one another.
ORDER = [
    ("fasttc._files",),
    ("fasttc.kernels",),
    ("fasttc.ops",),
    ("fasttc.worlds", "fasttc.testing"),
    ("fasttc.nn",),
    ("fasttc.formats",),
    ("fasttc.models",),
    ("fasttc.graph",),
    ("fasttc.training",),
    ("fasttc.evaluation",),
    ("fasttc.attribution",),
    ("fasttc.analysis",),
    ("fasttc.report",),
    ("fasttc.cli",),
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# What a layer must not know although it stands above it.
FORBIDDEN = {
    "fasttc.kernels": {"torch.nn", "torch.autograd", "fasttc._files"},
    "fasttc.graph": {"fasttc.nn", "fasttc.models", "fasttc.formats", "torch.nn"},
    "fasttc.training": {"fasttc.graph"},
    "fasttc.evaluation": {"fasttc.graph"},
    "fasttc.attribution": {"fasttc.training"},
    "fasttc.report": {"fasttc.models", "fasttc.training", "fasttc.attribution"},
}
ONLY_HERE = {  # third-party package -> the only places that may import it
    "transformers": {"fasttc.models"},
    "interp_engine": {"fasttc.models"},
    "triton": {"fasttc.kernels", "fasttc.benchmarks"},
    "fasttc.kernels": {"fasttc.ops", "fasttc.benchmarks"},
    "fasttc.benchmarks": {"fasttc.cli.bench"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "fasttc":
        parts.insert(0, "fasttc")
    return ".".join(parts).removesuffix(".__init__")


def sources() -> list[Path]:
    found = [
        *(ROOT / "fasttc").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def imports(path: Path) -> set[str]:
    """Absolute names of everything imported in a file, at any depth; relative imports are resolved."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> str | None:
    return next((layer for layer in LEVEL if within(name, layer)), None)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    module = module_name(path)
    own = layer_of(module)
    for imported in imports(path):
        for package, places in ONLY_HERE.items():
            if within(imported, package) and not within(module, package):
                assert any(within(module, place) for place in places), f"{module} must not import {imported}"
        other = layer_of(imported)
        if own is None or other is None or own == other:
            continue
        assert LEVEL[other] < LEVEL[own], f"{module} imports {imported}, which is not above it"
    for package in FORBIDDEN.get(own or "", ()):
        guilty = [name for name in imports(path) if within(name, package)]
        assert not guilty, f"{module} must not know {package}: {guilty}"


def test_every_layer_is_listed() -> None:
    folders = {
        f"fasttc.{p.name}" for p in (ROOT / "fasttc").iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert folders - {"fasttc.benchmarks"} <= set(LEVEL)


def test_an_upward_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "fasttc" / "ops" / "x.py"
    file.parent.mkdir(parents=True)
    for line, words in (
        ("from fasttc.cli import main", "not above it"),
        ("from ..nn import Site", "not above it"),
        ("def f():\n    import transformers.models", "must not import"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(AssertionError, match=words):
            test_imports_go_down_only(file)


def test_kernels_folder_has_no_init() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow another distribution"
