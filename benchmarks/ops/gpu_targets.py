"""What a run of the GPU suite says about its targets, and about the device's row of ``fasttc/ops/_costs.py``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttc.benchmarks import record


@dataclass(frozen=True)
class Target:
    """On some shapes of a part, ``other`` takes at least ``times`` as long as the fastest of ours.

    ``other`` is a competitor, or "roof": the time that the counted work takes at the measured rates of the device.
    """

    part: str
    other: str
    times: float
    shapes: tuple[str, ...]


def _shape(n: int, f: int, k: int = 64) -> str:
    return f"{n},2304,{f},{k},bfloat16"


_ENCODE = tuple(_shape(n, f) for n in (4096, 16384) for f in (65536, 131072))
_FEW, _MANY = _shape(4096, 65536), _shape(16384, 65536)
TARGETS = (
    Target("encode", "gemm", 1 / 1.25, _ENCODE),
    Target("encode", "dense", 1.8, _ENCODE),
    Target("decode", "roof", 0.7, (_FEW, _MANY)),
    Target("decode_backward", "dense", 3.0, (_FEW,)),
    Target("decode_backward", "dense", 4.0, (_MANY,)),
    Target("encode_backward", "dense", 3.0, (_FEW,)),
    Target("encode_backward", "dense", 4.0, (_MANY,)),
    Target("step", "dense", 2.0, (_FEW,)),
    Target("step", "dense", 2.8, (_MANY,)),
    Target("step", "dense", 0.97, (_shape(4096, 16384, 128),)),
)


def _rows(out: Path, part: str) -> list[dict[str, Any]]:
    path = out / f"{part}.json"
    return record.read(path)["rows"] if path.exists() else []


def judge(out: Path) -> list[str]:
    """One sentence per target and shape, each beginning with "met", "missed" or "open"."""
    said = []
    for target in TARGETS:
        for shape in target.shapes:
            what = f"{target.part} {shape}"
            rows = [r for r in _rows(out, target.part) if r["shape"] == shape and r["median"] is not None]
            ours = [r for r in rows if r["competitor"] in ("fasttc", "fasttc_rows")]
            if target.other == "roof":
                others = [r["roof"] for r in ours]
            else:
                others = [r["median"] for r in rows if r["competitor"] == target.other]
            if not ours or not others:
                said.append(f"open: {what}: no time of ours or of {target.other}")
                continue
            reached = min(others) / min(r["median"] for r in ours)
            verdict = "met" if reached >= target.times else "missed"
            said.append(
                f"{verdict}: {what}: {target.other} / ours = {reached:.2f} (at least {target.times:.2f})"
            )
    return said


def rates(out: Path) -> dict[str, float]:
    """Rates of this device by the names of ``Costs``, as far as the run measured them; bytes and FLOP per second.

    ``tile_efficiency`` comes out too low by what selection takes.
    """
    found: dict[str, float] = {}
    for part in ("encode", "odd"):
        path = out / f"{part}.json"
        if path.exists():
            roofs = record.read(path)["roofs"]
            found["bandwidth"] = max(roofs["copy"], found.get("bandwidth", 0.0))
            for dtype, rate in roofs["gemm"].items():
                found["single" if dtype == "float32" else "half"] = rate
    gathers = [r["bytes"] / r["median"] * 1e3 for r in _rows(out, "decode")
               if r["competitor"] == "fasttc" and r["median"]]  # fmt: skip
    if gathers:
        found["gather"] = max(gathers)
    times = {(r["shape"], r["competitor"]): r["median"] for r in _rows(out, "encode") if r["median"]}
    shares = [
        gemm / times[shape, "fasttc_tile"]
        for (shape, name), gemm in times.items()
        if name == "gemm" and (shape, "fasttc_tile") in times
    ]
    if shares:
        found["tile_efficiency"] = max(shares)
    return found
