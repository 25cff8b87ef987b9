"""Feature files: the evidence for features as the JSON that circuit-tracer's and Neuronpedia's viewers read.

*Plain*: one file ``<scan>/<id>.json`` per feature, where the id is Cantor's pairing of layer and index, as in graph
files. *Packed*: ``index.json.gz``, a list with ``{"filename", "offsets"}`` per layer, and ``layer_<i>.bin``. The
record of feature ``f`` lies at ``offsets[f]`` to ``offsets[f + 1]``: four bytes little-endian length, then
zlib-compressed JSON; that of a feature without evidence is empty. Viewers fetch records by byte range. In both,
``owner`` says whether a feature is a transcoder's or an adapter's; layer and index are those in that set. *Lines*: one
JSON object per line and feature, for people and judges: figures, tokens, and the strongest examples as marked text.
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttc._files import atomic_file, atomic_folder
from fasttc.analysis import Example, FeatureEvidence
from fasttc.graph.export import feature_number
from fasttc.report.evidence import Owner
from fasttc.report.packed import INDEX

_PACKED = re.compile(r"layer_\d+\.bin|" + re.escape(INDEX))

BINS = 40
MARKS = "«", "»"
"""Around the token of an example on which the feature is most active."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def feature_json(
    evidence: FeatureEvidence, names: Sequence[str], scan: str = "", owner: Owner = "transcoder"
) -> dict[str, Any]:
    """One feature as JSON. ``names`` gives the text of every token id."""
    sample = np.array(evidence.sample) if evidence.sample else np.zeros(1)
    counts, _ = np.histogram(sample, bins=BINS, range=(0.0, max(evidence.maximum, 1e-12)))
    quantiles = [{"quantile_name": "Top", "examples": [_example(e, names) for e in evidence.top]}]
    quantiles += [
        {"quantile_name": f"Subsample interval {i}", "examples": [_example(e, names) for e in part]}
        for i, part in enumerate(evidence.intervals)
    ]
    return {
        "transcoder_id": f"{scan}-{evidence.layer}" if scan else str(evidence.layer),
        "index": evidence.index,
        "layer": evidence.layer,
        "owner": owner,
        "examples_quantiles": quantiles,
        "top_logits": [names[token] for token, _ in evidence.promoted],
        "bottom_logits": [names[token] for token, _ in evidence.suppressed],
        "top_embeddings": [names[token] for token, _ in evidence.embeddings],
        "act_min": 0.0,
        "act_max": evidence.maximum,
        "quantile_values": np.quantile(sample, QUANTILES).tolist(),
        "histogram": counts.tolist(),
        "activation_frequency": evidence.rate,
    }


def _example(example: Example, names: Sequence[str]) -> dict[str, Any]:
    return {
        "tokens": [names[token] for token in example.tokens],
        "tokens_acts_list": [round(value, 4) for value in example.activations],
        "train_token_ind": example.peak,
        "is_repeated_datapoint": False,
    }


def write_plain(
    folder: str | Path,
    scan: str,
    found: Iterable[FeatureEvidence],
    names: Sequence[str],
    owner: Owner = "transcoder",
) -> Path:
    """Writes ``<folder>/<scan>/<id>.json`` for every feature, each whole or absent; returns the folder of the files."""
    where = Path(folder) / scan
    for evidence in found:
        path = where / f"{feature_number(evidence.layer, evidence.index)}.json"
        with atomic_file(path) as temporary:
            temporary.write_bytes(_encoded(evidence, names, scan, owner))
    return where


def write_packed(
    folder: str | Path,
    scan: str,
    found: Sequence[FeatureEvidence],
    names: Sequence[str],
    n_features: int,
    owner: Owner = "transcoder",
) -> Path:
    """Writes the packed files of all layers as one folder that takes the place of ``folder``; returns it.

    Raises:
        ValueError: as :func:`check_packed_folder`; the folder is left as it was.
    """
    check_packed_folder(folder)
    by_layer: dict[int, dict[int, FeatureEvidence]] = {}
    for evidence in found:
        by_layer.setdefault(evidence.layer, {})[evidence.index] = evidence
    with atomic_folder(folder) as temporary:
        index: list[dict[str, Any]] = []
        for layer in range(max(by_layer) + 1):
            name, offsets = f"layer_{layer}.bin", [0]
            with open(temporary / name, "wb") as file:
                for feature in range(n_features):
                    evidence = by_layer.get(layer, {}).get(feature)
                    size = 0
                    if evidence is not None:
                        record = zlib.compress(_encoded(evidence, names, scan, owner))
                        size = file.write(struct.pack("<I", len(record))) + file.write(record)
                    offsets.append(offsets[-1] + size)
            index.append({"filename": name, "offsets": offsets})
        (temporary / INDEX).write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
    return Path(folder)


def check_packed_folder(folder: str | Path) -> None:
    """Whether packed files may take the place of ``folder``: it is absent, empty, or holds packed files alone.

    Raises:
        ValueError: it holds something else, which would be lost.
    """
    found = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
    strange = [name for name in found if not _PACKED.fullmatch(name)]
    if found and (strange or INDEX not in found):
        raise ValueError(
            f"{folder}: expected an empty folder or an earlier packed set ({INDEX}, layer_<i>.bin), which is replaced, "
            f"got a folder with {(strange or found)[0]}"
        )


def _encoded(evidence: FeatureEvidence, names: Sequence[str], scan: str, owner: Owner) -> bytes:
    return json.dumps(feature_json(evidence, names, scan, owner)).encode()


def write_lines(
    path: str | Path,
    found: Iterable[FeatureEvidence],
    names: Sequence[str],
    decode: Callable[[list[int]], str],
) -> Path:
    """Writes one line of JSON per feature (see :func:`feature_line`), the file whole or absent; returns it."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for evidence in found:
            file.write(json.dumps(feature_line(evidence, names, decode), ensure_ascii=False) + "\n")
    return Path(path)


def feature_line(
    evidence: FeatureEvidence, names: Sequence[str], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """One feature for a reader: what it is named by, its figures, its tokens, and its strongest examples.

    Args:
        evidence: of the feature.
        names: the text of every token id.
        decode: the text of several ids together.
    """
    return {
        "id": f"{evidence.layer}:{evidence.index}",
        "layer": evidence.layer,
        "feature": evidence.index,
        "firing_rate": evidence.rate,
        "max_activation": evidence.maximum,
        "mean_activation": evidence.mean,
        "decoder_norm": evidence.decoder_norm,
        "strength": evidence.strength,
        "promoted": [names[token] for token, _ in evidence.promoted],
        "suppressed": [names[token] for token, _ in evidence.suppressed],
        "examples": [_marked(example, names, decode) for example in evidence.top],
    }


def _marked(example: Example, names: Sequence[str], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The text around a peak with the peak's token marked: parts of one decoded text, since spaces depend on it."""
    text = decode(example.tokens)
    start, stop = (_shared(decode(example.tokens[: example.peak + more]), text) for more in (0, 1))
    token = text[start:stop]
    start += len(token) - len(token.lstrip() or token)  # a space before a word stays outside
    return {
        "text": f"{text[:start]}{MARKS[0]}{text[start:stop]}{MARKS[1]}{text[stop:]}",
        "token": names[example.tokens[example.peak]],
        "activation": example.activations[example.peak],
    }


def _shared(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
