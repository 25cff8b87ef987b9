"""What adapted transcoders kept of the base's, as the verbs show it."""

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
