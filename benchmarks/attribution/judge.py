"""The targets, held against what was measured."""

from collections.abc import Iterator
from typing import Any

# Shares of circuit-tracer's own time on its case ``base`` (one thread, batch 256), by its instrumented hooks.
PROFILE = {"features": 0.74, "backward": 0.155, "forward": 0.074}
Verdict = dict[str, Any]


def verdict(what: str, measured: str, target: str, met: bool, headline: bool = False) -> Verdict:
    """A line of the table; ``headline``: also of the README's."""
    return {"what": what, "measured": measured, "target": target, "met": met, "headline": headline}


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """One verdict per target that the rows can answer."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    judges = (_versus, _prune, _tokens, _features, _targets, _long, _accuracy)
    return [found for judge_part in judges for found in judge_part(by_task)]


def _versus(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    if "ours" not in by_task or "replicated" not in by_task:
        return
    ours, others = by_task["ours"][0], by_task["replicated"]
    fastest = min(others, key=lambda row: row["seconds"])
    ratio = fastest["seconds"] / ours["seconds"]
    yield verdict(
        f"whole graph ({ours['features']:,} features, {ours['edges']:,} edges) against circuit-tracer's algorithm",
        f"{ratio:.1f} × faster ({ours['seconds']:.2f} s and {fastest['seconds']:.1f} s at batch {fastest['batch']})",
        "12 × (stretch 15 ×)",
        ratio >= 12,
        headline=True,
    )
    share = ours["extra"] / fastest["extra"]
    sizes = f"{ours['extra'] / 2**30:.2f} and {fastest['extra'] / 2**30:.2f} GiB"
    yield verdict("extra memory of the same", f"{share:.2f} ({sizes})", "1/4", share <= 0.25, headline=True)
    worst = max(row["difference"] for row in others)
    yield verdict(
        "largest difference between their edges", f"{worst:.1e} of the largest", "1e-5", worst <= 1e-5
    )
    for row in others:
        shares = {part: row["shares"][part] for part in PROFILE}
        shown = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        wanted = ", ".join(f"{share:.0%}" for share in PROFILE.values())
        near = all(abs(share - PROFILE[part]) <= 0.1 for part, share in shares.items())
        yield verdict(
            f"profile of that algorithm, batch {row['batch']}", shown, f"{wanted} ± 10 points", near
        )


def _prune(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    if "prune" not in by_task or "prune_dense" not in by_task:
        return
    ours, dense = by_task["prune"][0], by_task["prune_dense"][0]
    ratio, share = dense["seconds"] / ours["seconds"], ours["extra"] / dense["extra"]
    times = f"{ours['seconds']:.2f} s and {dense['seconds']:.2f} s"
    faster = f"{ratio:.1f} × faster ({times})"
    yield verdict("pruning and scores", faster, "10 × (stretch 20 ×)", ratio >= 10, headline=True)
    sizes = f"{ours['extra'] / 2**30:.2f} and {dense['extra'] / 2**30:.2f} GiB"
    yield verdict("extra memory of pruning", f"{share:.2f} ({sizes})", "1/4", share <= 0.25)


def _doublings(row: dict[str, Any], name: str) -> list[tuple[int, float]]:
    pairs = zip(row[name], row["seconds"], strict=True)
    by_size = dict(pairs)
    return [(size, by_size[2 * size] / by_size[size]) for size in by_size if 2 * size in by_size]


def _tokens(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    for row in by_task.get("tokens_scaling", []):
        for size, ratio in _doublings(row, "tokens"):
            what = f"{2 * size} tokens against {size}, all targets"
            yield verdict(what, f"{ratio:.2f} ×", "4.6 ×", ratio <= 4.6, headline=size >= 48)


def _features(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    for row in by_task.get("features_scaling", []):
        for size, ratio in _doublings(row, "features"):
            what = f"{2 * size:,} features per layer against {size:,}, as many active"
            yield verdict(what, f"{ratio:.2f} ×", "1.1 ×", ratio <= 1.1)


def _targets(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    for row in by_task.get("targets_scaling", []):
        rates = [seconds / count for seconds, count in zip(row["seconds"], row["operations"], strict=True)]
        worst = max(rates) / rates[0]
        what = (
            f"{row['targets']} targets, {row['tokens'][0]} to {row['tokens'][-1]} tokens, against a·T + b·T²"
        )
        yield verdict(what, f"at most {worst:.2f} ×", "1.2 ×", worst <= 1.2)


def _long(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    for row in by_task.get("long_prompt", []):
        seconds, gib = (60, 6) if row["tokens"] <= 1024 else (180, 10)
        peak = row["peak"] / 2**30
        yield verdict(
            f"{row['tokens']:,} tokens ({row['active']:,} active features), {row['targets']:,} feature targets",
            f"{row['seconds']:.1f} s, {peak:.2f} GiB (whole process)",
            f"{seconds} s, {gib} GiB",
            row["seconds"] <= seconds and peak <= gib,
            headline=True,
        )


def _accuracy(by_task: dict[str, list[dict[str, Any]]]) -> Iterator[Verdict]:
    for row in by_task.get("accuracy", []):
        overlap, flips = row["overlap"], row["flips"]
        yield verdict(
            "bfloat16 against float32: top 100 edges in common", f"{overlap:.0%}", "95 %", overlap >= 0.95
        )
        what = f"sign flips among the {row['kept']:,} edges kept at 0.8/0.98"
        yield verdict(what, f"{flips:.3%}", "0.1 %", flips < 0.001)


def table(verdicts: list[Verdict]) -> str:
    """Target and measurement side by side."""
    rows = [(v["what"], v["measured"], v["target"], "met" if v["met"] else "MISSED") for v in verdicts]
    rows = [("", "measured", "target", ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
