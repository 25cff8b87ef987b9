"""What verbs that work with adapters share: loading both models, and features named on the command line."""

from pathlib import Path
from typing import Any

from fasttc.cli._common import Run, load_model, table


def load_pair(run: Run, target: str, base: str) -> tuple[Any, Any, Any]:
    """(target, base, the target's tokenizer or None).

    Raises:
        ValueError: tokenizers that differ.
    """
    from fasttc.models import check_same_tokenizer

    model, tokenizer = load_model(run, target)
    base_model, base_tokenizer = load_model(run, base)
    check_same_tokenizer(tokenizer, base_tokenizer)
    return model, base_model, tokenizer


def load_adapters(run: Run, reference: str) -> Any:
    """An adapter set in any known format, on the run's device."""
    from fasttc.formats import AdapterSet

    return AdapterSet.from_pretrained(reference, device=run.device)


def parse_features(text: str, option: str) -> list[tuple[int, int]]:
    """``"0:12,3:7"``, or ``"@FILE"`` with such pairs separated by commas or white space, as (layer, index) pairs.

    Raises:
        ValueError: anything else, or nothing.
    """
    expected = f"{option}: expected LAYER:INDEX pairs (0:12,3:7) or @FILE"
    given = text
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise ValueError(f"{expected}, there is no file {path}")
        given = path.read_text(encoding="utf-8")
    found = []
    for pair in given.replace(",", " ").split():
        layer, _, index = pair.partition(":")
        if not (layer.isdecimal() and index.isdecimal()):
            raise ValueError(f"{expected}, got {pair!r}")
        found.append((int(layer), int(index)))
    if not found:
        raise ValueError(f"{expected}, got none")
    return found


def quality_text(found: Any) -> str:
    """KL, top-1 error and L0 of the hybrid and of the adapted hybrid, as a table."""
    rows = [
        {"": name, "KL": quality.kl, "top-1 error": quality.top1_error, "NMSE, last layer": quality.nmse[-1]}
        | {"mean L0": quality.mean_l0}
        for name, quality in (("hybrid", found.hybrid), ("adapted", found.adapted))
    ]
    return f"{table(rows)}\n{found.kl_recovered:.1%} of the hybrid's KL to the target taken away"
