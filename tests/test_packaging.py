"""What is shipped: the wheel holds fasttc/ only, kernels and benchmarks inside it; editable and bare checkouts work."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fasttc", "kernels", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PROBE = "import fasttc.kernels, fasttc.benchmarks, fasttc.ops; print(*fasttc.kernels.__path__)"
PAGE = [path for folder in ("_assets", "_vendor") for path in (ROOT / "fasttc" / "report" / folder).iterdir()]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that the build leaves nothing behind in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source)
    run(*pip, cwd=out)
    (built,) = out.glob("fasttc-*.whl")
    return built


def test_wheel_holds_only_fasttc(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fasttc"}
    assert not [name for name in names if "/results/" in name or name.startswith("tests")]
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= {Path(name).name for name in names if name.startswith("fasttc/kernels/")}
    assert "fasttc/kernels/__init__.py" not in names, "the checkout's stand-in must not be shipped"
    assert "fasttc/py.typed" in names
    page = {f"fasttc/report/{path.relative_to(ROOT / 'fasttc' / 'report')}" for path in PAGE}
    assert page <= set(names)
    assert "fasttc/report/_vendor/d3.LICENSE" in names


def test_wheel_works_when_unpacked_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shown = run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site" / "fasttc" / "kernels") in shown


def test_editable_install_sees_the_folders(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "--target",
        target,
    )
    run(*pip, "-e", source, cwd=tmp_path)
    code = f"import site; site.addsitedir({str(target)!r}); {PROBE}"
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target), PYTHONSAFEPATH="1")
    assert str(source / "kernels") in shown


def test_bare_checkout_works() -> None:
    shown = run(sys.executable, "-c", PROBE, cwd=ROOT)
    assert shown.strip() == str(ROOT / "kernels")


def test_version_is_a_literal() -> None:
    first = next(
        line for line in (ROOT / "fasttc/__init__.py").read_text().splitlines() if "__version__ =" in line
    )
    assert first.split("=")[1].strip().strip('"').count(".") == 2
