"""What adapted transcoders kept of the base's, as the verbs show it."""

import csv
from pathlib import Path
from typing import Any

from fasttc.cli._common import table


def carried_over(
    model: Any, base: Any, tcs: Any, data: Any, file: Path | None, **options: Any
) -> tuple[dict[str, Any], str]:
    """Measures every feature against the base's, writes them to ``file``: (JSON result, table of the layers)."""
    from fasttc.evaluation.carry_over import carry_over, summary, write_table

    layers = carry_over(model, base, tcs, data, **options)
    if file is not None:
        write_table(layers, file)
    rows = summary(layers)
    return {"carry_over": rows, "features": None if file is None else str(file)}, table(rows)


def read_verdicts(path: Path) -> dict[tuple[int, int], str]:
    """What a table written by :func:`carried_over` says of each feature, by (layer, index).

    Raises:
        ValueError: no such file, another table, or a line that is broken off.
    """
    if not path.is_file():
        raise ValueError(f"--carry-over: expected a table of features, there is no file {path}")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"layer", "feature", "verdict"} <= set(rows.fieldnames or ()):
            raise ValueError(
                f"--carry-over: expected columns layer, feature and verdict in {path}, got {rows.fieldnames}"
            )
        found: dict[tuple[int, int], str] = {}
        for row in rows:
            try:
                found[int(row["layer"]), int(row["feature"])] = row["verdict"].strip()
            except (AttributeError, TypeError, ValueError):
                raise ValueError(
                    f"--carry-over: expected two numbers and a verdict in {path} line {rows.line_num}, got {row}"
                ) from None
        return found
