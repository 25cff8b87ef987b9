"""Maps kernels/ to fasttc.kernels and benchmarks/ to fasttc.benchmarks (docs/design/0001-kernels-folder.md)."""

from pathlib import Path

from setuptools import find_packages, setup

MAPPED = {"fasttc.kernels": "kernels", "fasttc.benchmarks": "benchmarks"}


def subpackages(package: str, folder: str) -> list[str]:
    """The mapped package and every folder of Python files below it, results left out."""
    root = Path(__file__).parent / folder
    found = {path.parent.relative_to(root) for path in root.rglob("*.py")}
    dotted = [".".join((package, *parts.parts)) for parts in found if "results" not in parts.parts]
    return sorted({package, *dotted})


setup(
    packages=[
        *(name for name in find_packages(include=["fasttc", "fasttc.*"]) if name not in MAPPED),
        *(name for package, folder in MAPPED.items() for name in subpackages(package, folder)),
    ],
    package_dir=MAPPED,
    package_data={"fasttc": ["py.typed"], "fasttc.report": ["_assets/*", "_vendor/*"]},
)
