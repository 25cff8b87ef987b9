"""Features in categories, relevance × correctness: how many there are, and how much of the writing they do.

Tan et al. 2026 (10.1609/aaai.v40i39.40604) count features by medical relevance and by whether their reasoning is
right, before and after fine-tuning. A feature's share here is that of its *strength*, mean activation times norm of the
decoder row, among all features of the table.
"""

import csv
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttc.nn.adapter import Feature

Label = tuple[str, str]
"""(relevance, correctness): any words, such as ("medical", "right")."""
Judge = Callable[[Mapping[str, Any]], Label]
"""Gives the label of one feature, as :func:`fasttc.report.feature_files.feature_line` describes it."""

UNLABELLED: Label = ("no label", "-")
_FIELDS = ("layer", "feature", "relevance", "correctness")


@dataclass(frozen=True)
class Category:
    """Features of one label in one layer, or in all.

    Attributes:
        layer: of the model; None: all layers of the table.
        relevance, correctness: the label.
        features: how many have it.
        active: how many of them were active at all.
        share: of the strength of all features of this layer (of the table, where layer is None); NaN where none writes.
    """

    layer: int | None
    relevance: str
    correctness: str
    features: int
    active: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"share": None if math.isnan(self.share) else self.share}


def feature_categories(
    features: Sequence[Mapping[str, Any]], labels: Mapping[Feature, Label]
) -> list[Category]:
    """The table of categories: first those of all layers together, the largest share first, then layer by layer.

    Every layer lists the same categories in the same order. Features without a label are a category of their own,
    :data:`UNLABELLED`.

    Args:
        features: mappings with layer, feature, firing_rate and strength (activation × decoder norm), such as
            :func:`read_features` gives.
        labels: by (layer, feature).

    Raises:
        ValueError: no features; a label of a feature that is not there; no feature with a label.
    """
    places = {(row["layer"], row["feature"]): row for row in features}
    if not places:
        raise ValueError("features: expected at least one, got none")
    if unknown := sorted(labels.keys() - places.keys()):
        shown = ", ".join(f"{layer}:{feature}" for layer, feature in unknown[:5])
        raise ValueError(f"labels: expected features of the table, got {len(unknown)} others, first {shown}")
    if not labels:
        raise ValueError("labels: expected a label for at least one feature, got none")
    given = {place: labels.get(place, UNLABELLED) for place in places}
    found = _counted(None, given, places, sorted(set(given.values())))
    found.sort(key=lambda category: -category.share)
    order = [(category.relevance, category.correctness) for category in found]
    for layer in sorted({layer for layer, _ in places}):
        own = {place: label for place, label in given.items() if place[0] == layer}
        found += _counted(layer, own, places, order)
    return found


def _counted(
    layer: int | None,
    given: Mapping[Feature, Label],
    places: Mapping[Feature, Mapping[str, Any]],
    order: Sequence[Label],
) -> list[Category]:
    total = sum(float(places[place]["strength"]) for place in given)
    found = []
    for label in order:
        rows = [places[place] for place, own in given.items() if own == label]
        strength = sum(float(row["strength"]) for row in rows)
        active = sum(row["firing_rate"] > 0 for row in rows)
        found.append(Category(layer, *label, len(rows), active, strength / total if total else float("nan")))
    return found


def judged(features: Iterable[Mapping[str, Any]], judge: Judge) -> dict[Feature, Label]:
    """The label that a judge gives to each feature.

    Raises:
        ValueError: an answer that is not two words, with the feature it was given for.
    """
    found = {}
    for row in features:
        answer = judge(row)
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            where = f"{row['layer']}:{row['feature']}"
            raise ValueError(f"judge, feature {where}: expected (relevance, correctness), got {answer!r}")
        found[row["layer"], row["feature"]] = _label(dict(zip(_FIELDS[2:], answer, strict=True)), "judge")
    return found


def ask_command(command: str, features: Sequence[Mapping[str, Any]]) -> dict[Feature, Label]:
    """Labels from a program: it is given one JSON object per feature and line, and prints one for each that it labels.

    Args:
        command: its words, as in a shell, but run without one.
        features: see :func:`feature_categories`; what is in a mapping is what the program sees.

    Raises:
        ValueError: a program that cannot be started or fails, or answers that are no labels (see :func:`read_labels`).
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in features)
    try:
        done = subprocess.run(
            shlex.split(command), input=lines, capture_output=True, text=True, encoding="utf-8"
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"judge: expected UTF-8 from {command!r}, got something else: {error}") from error
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"judge: expected a program that can be run, got {command!r}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        raise ValueError(f"judge: {command!r} ended with {done.returncode}: {said[0]}")
    return _labels(_json_lines(done.stdout, "judge"), "judge")


def read_labels(path: str | Path) -> dict[Feature, Label]:
    """Labels from a file: .csv with a header, or .jsonl; layer, feature, relevance, correctness, and whatever else.

    Raises:
        ValueError: no such file, another ending, a field that is missing or empty, a layer or feature that is no
            number >= 0, a feature with two labels. With the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"labels: no such file: {path}")
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"labels: expected a file that ends in .csv or .jsonl, got {path.name}")
    content = _content(path, "labels")
    if path.suffix == ".jsonl":
        rows = _json_lines(content, str(path))
    else:
        reader = csv.DictReader(content.splitlines())
        if missing := [name for name in _FIELDS if name not in (reader.fieldnames or ())]:
            have = ", ".join(reader.fieldnames or ()) or "nothing"
            raise ValueError(
                f"labels: expected the columns {', '.join(missing)} in {path}, its header has {have}"
            )
        rows = [(reader.line_num, row) for row in reader]
    return _labels(rows, str(path))


def read_features(path: str | Path) -> list[dict[str, Any]]:
    """Features as :func:`fasttc.report.feature_files.write_lines` writes them.

    Raises:
        ValueError: no such file; a line that is no JSON object or lacks what the table needs, figures that are no
            numbers >= 0, a feature twice. With the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"features: no such file: {path}")
    rows = _json_lines(_content(Path(path), "features"), str(path))
    lines: dict[Feature, int] = {}
    for number, row in rows:
        missing = [name for name in ("layer", "feature", "firing_rate", "strength") if name not in row]
        if missing:
            raise ValueError(
                f"{path} line {number}: expected {', '.join(missing)}, it has {', '.join(row) or 'nothing'}"
            )
        _check_figures(row, f"{path} line {number}")
        place = row["layer"], row["feature"]
        if lines.setdefault(place, number) != number:
            raise ValueError(
                f"{path} line {number}: expected each feature once, {place[0]}:{place[1]} is in line {lines[place]} too"
            )
    return [row for _, row in rows]


def _check_figures(row: Mapping[str, Any], where: str) -> None:
    for name, kinds in (
        ("layer", int),
        ("feature", int),
        ("firing_rate", int | float),
        ("strength", int | float),
    ):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
            what = "an integer" if kinds is int else "a number"
            raise ValueError(f"{where}: expected {what} >= 0 in {name!r}, got {value!r}")


def _content(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8 text, {path} is not (byte {error.start})") from None


def _json_lines(content: str, source: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) for every line that is not blank."""
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source} line {number}: expected a JSON object, got {line[:40]!r}: {error}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{source} line {number}: expected a JSON object, got {line[:40]!r}")
        found.append((number, row))
    return found


def _labels(rows: Iterable[tuple[int, Mapping[str, Any]]], source: str) -> dict[Feature, Label]:
    found: dict[Feature, Label] = {}
    for number, row in rows:
        where = f"{source} line {number}"
        place = _number(row, "layer", where), _number(row, "feature", where)
        label = _label(row, where)
        if found.setdefault(place, label) != label:
            raise ValueError(
                f"{where}: feature {place[0]}:{place[1]}: expected one label, got {label} after {found[place]}"
            )
    if not found:
        raise ValueError(f"{source}: expected a label for at least one feature, got none")
    return found


def _number(row: Mapping[str, Any], name: str, where: str) -> int:
    try:
        number = int(str(row[name]))
    except (KeyError, ValueError):
        raise ValueError(f"{where}: expected a number in {name!r}, got {row.get(name)!r}") from None
    if number < 0:
        raise ValueError(f"{where}: expected a number >= 0 in {name!r}, got {number}")
    return number


def _label(row: Mapping[str, Any], where: str) -> Label:
    """Both words in lower case; an empty or missing one is an error, '-' says that a question does not arise."""
    words = []
    for name in _FIELDS[2:]:
        word = row.get(name)
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"{where}: expected a word in {name!r} ('-' for none), got {word!r}")
        words.append(word.strip().lower())
    return words[0], words[1]
