"""Where figures come from, and the JSON they are kept in."""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
COMMAND = [sys.executable, "-m", __package__]
"""What starts a suite in a process of its own."""
ROOT = Path(__file__).resolve().parent
DATA = ROOT.parent.parent / "shared" / "data"  # small models and texts beside a checkout, where there are any


def parser(suite: str, doc: str | None) -> argparse.ArgumentParser:
    """Of a suite's arguments; ``doc``, its module's docstring, is what --help says, as it is laid out."""
    formatter = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {suite}", description=doc, formatter_class=formatter
    )


def environment(device: str, seed: int) -> dict[str, Any]:
    """Device, driver, versions, commit and seed."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _driver() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "seed": seed,
    }


def commit() -> str | None:
    """Of the checkout, with a + where library or benchmarks differ from it; None outside of a checkout."""
    revision = _output("git", "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    changed = _output(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "../fasttc", "../kernels", "."
    )
    return revision + ("+" if changed else "")


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One JSON object with one line per row; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n  ".join(json.dumps(row, sort_keys=True) for row in rows)
    text = json.dumps({"schema": SCHEMA, **head, "rows": []}, indent=1)
    text = text.removesuffix("[]\n}") + (f"[\n  {body}\n ]\n}}\n" if rows else "[]\n}\n")
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """A file that :func:`write` wrote.

    Raises:
        ValueError: another schema.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {data.get('schema')!r}")
    return data


def device_folder(name: str) -> str:
    """Name of a device as a folder: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def resident(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since the mark was set."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(key + ":"):
            return 1024 * int(text.split()[1])
    raise OSError(f"/proc/self/status: expected a line {key}, found none")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
