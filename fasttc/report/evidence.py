"""Feature evidence for the page: reads the feature files that ``feature_files`` and others write, plain and packed.

Plain: one file per feature, named by Cantor's pairing of layer and index. Packed: see ``packed``. Either lies in the
folder itself or in one folder per model below it: ``<folder>/<pair>.json`` or ``<folder>/<scan>/<pair>.json``. The file
of an adapter's feature says so (``"owner": "adapter"``); its numbers are the adapter's own.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from fasttc._files import read_json
from fasttc.graph.export import feature_number
from fasttc.report.packed import INDEX, PackedFiles

Owner = Literal["transcoder", "adapter"]
_LOGITS = 10  # promoted and suppressed tokens that are shown
_EXAMPLES = 5  # of the first group (the strongest); two of every other
_TOKENS = 64  # of one example, around its strongest token


class FeatureFolder:
    """A folder of feature files.

    Args:
        path: the folder.
        scan: name of the folder below it to read; by default the only one, if the files are not in ``path`` itself.

    Raises:
        ValueError: no such folder; no feature files in it; several models in it and none named; a broken index.
    """

    def __init__(self, path: str | Path, scan: str | None = None) -> None:
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"features: expected a folder of feature files, {path} is not a folder")
        if scan is not None and (path / scan).is_dir():
            path /= scan
        if not _holds_features(path):
            below = sorted(folder for folder in path.iterdir() if folder.is_dir() and _holds_features(folder))
            if len(below) != 1:
                found = ", ".join(folder.name for folder in below) or "none"
                raise ValueError(
                    f"features: expected feature files in {path} or in one folder below, got {found}"
                )
            (path,) = below
        self.path = path
        self._packed = PackedFiles(path) if (path / INDEX).is_file() else None

    def find(self, layer: int, index: int, owner: Owner = "transcoder") -> dict[str, Any] | None:
        """What the page shows of a feature, or None if there is nothing about it.

        Args:
            layer, index: of the feature in its own set.
            owner: whose feature it is; one of the other owner with these numbers is another feature.

        Raises:
            ValueError: the file is not a feature file; the message names it.
        """
        file = self.path / f"{feature_number(layer, index)}.json"
        if self._packed is not None:
            file, content = self._packed.path / INDEX, self._packed.read(layer, index)
        else:
            content = read_json(file) if file.is_file() else None
        if content is None:
            return None
        try:
            return shown(content) if content.get("owner", "transcoder") == owner else None
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{file}: expected a feature file, got a broken one for {layer}/{index}: {error!r}"
            ) from error


def find_evidence(
    folders: Iterable[FeatureFolder], owner: Owner, layer: int, index: int
) -> dict[str, Any] | None:
    """What the first folder that knows the feature has on it, or None."""
    found = (folder.find(layer, index, owner) for folder in folders)
    return next((evidence for evidence in found if evidence is not None), None)


def _holds_features(folder: Path) -> bool:
    return (folder / INDEX).is_file() or any(folder.glob("[0-9]*.json"))


def shown(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a feature file that the page shows, with every type made sure of."""
    groups = []
    for number, group in enumerate(content.get("examples_quantiles") or []):
        examples = group["examples"][: _EXAMPLES if number == 0 else 2]
        groups.append({"name": str(group["quantile_name"]), "examples": [_example(one) for one in examples]})
    frequency = content.get("activation_frequency")
    return {
        "top": [str(token) for token in (content.get("top_logits") or [])[:_LOGITS]],
        "bottom": [str(token) for token in (content.get("bottom_logits") or [])[:_LOGITS]],
        "embeddings": [str(token) for token in (content.get("top_embeddings") or [])[:_LOGITS]],
        "groups": groups,
        "histogram": [float(count) for count in content.get("histogram") or []],
        "range": [float(content.get("act_min") or 0), float(content.get("act_max") or 0)],
        "frequency": None if frequency is None else float(frequency),
    }


def _example(example: dict[str, Any]) -> dict[str, Any]:
    tokens = [str(token) for token in example["tokens"]]
    acts = [float(value) for value in example["tokens_acts_list"]]
    if len(tokens) != len(acts):
        raise ValueError(f"expected one activation per token, got {len(acts)} for {len(tokens)}")
    peak = max(range(len(acts)), key=acts.__getitem__, default=0)
    first = max(0, min(peak - _TOKENS // 2, len(tokens) - _TOKENS))
    window = slice(first, first + _TOKENS)
    return {"tokens": tokens[window], "acts": [round(value, 4) for value in acts[window]]}
