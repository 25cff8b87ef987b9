"""What a graph must look like; called once, when it is made."""

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasttc.graph.influence import chunks

if TYPE_CHECKING:
    from fasttc.graph.graph import Graph


def _integers(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    if (tensor.is_floating_point() or tensor.dtype == torch.bool) and tensor.numel():
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor.to(dtype).contiguous()


def _floats(value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous()


def _strings(name: str, value: Any, ids: Tensor) -> list[str]:
    if value is None or (not isinstance(value, str) and not len(value)):
        return [str(number) for number in ids.tolist()]
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a list of strings, got one string")
    strings = list(value)
    if not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{name}: expected a list of strings, got other types in it")
    if len(strings) != len(ids):
        raise ValueError(f"{name}: expected {len(ids)} strings, got {len(strings)}")
    return strings


def normalise(graph: "Graph") -> None:
    """Brings the attributes of a new graph into their canonical types."""
    clean: dict[str, Any] = {
        "n_layers": operator.index(graph.n_layers),
        "features": _integers("features", graph.features, torch.int64),
        "activations": _floats(graph.activations),
        "input_ids": _integers("input_ids", graph.input_ids, torch.int64),
        "logit_ids": _integers("logit_ids", graph.logit_ids, torch.int64),
        "logit_probs": _floats(graph.logit_probs),
        "row_ptr": _integers("row_ptr", graph.row_ptr, torch.int64),
        "columns": _integers("columns", graph.columns, torch.int32),
        "values": _floats(graph.values),
    }
    for name, tensor in clean.items():
        if isinstance(tensor, Tensor) and tensor.ndim != (2 if name == "features" else 1):
            expected = "[n, 3]" if name == "features" else "one dimension"
            raise ValueError(f"{name}: expected {expected}, got shape {list(tensor.shape)}")
    clean["tokens"] = _strings("tokens", graph.tokens, clean["input_ids"])
    clean["logit_labels"] = _strings("logit_labels", graph.logit_labels, clean["logit_ids"])
    for name, value in clean.items():
        object.__setattr__(graph, name, value)
    given = graph.remainder is not None and len(graph.remainder) > 0
    remainder = torch.as_tensor(graph.remainder) if given else torch.zeros(graph.n_nodes)
    object.__setattr__(graph, "remainder", remainder.detach().to("cpu", torch.float64).contiguous())
    if not isinstance(graph.prompt, str):
        raise TypeError(f"prompt: expected a string, got {type(graph.prompt).__name__}")
    if not isinstance(graph.metadata, dict):
        raise TypeError(f"metadata: expected a dict, got {type(graph.metadata).__name__}")


def _finite(name: str, tensor: Tensor) -> None:
    # A float64 sum of float32 numbers is finite exactly when all of them are; it needs no mask of the whole tensor.
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(tensor.numpy().sum(dtype=np.float64))
    if not np.isfinite(total) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name}: expected finite numbers, got {int((~torch.isfinite(tensor)).sum())} NaN or infinite"
        )


def _length(name: str, tensor: Tensor, expected: int) -> None:
    if len(tensor) != expected:
        raise ValueError(f"{name}: expected {expected} entries, got {len(tensor)}")


def check_nodes(graph: "Graph") -> None:
    """Shapes, ranges and order of everything but the edges."""
    if graph.n_layers < 1 or graph.n_tokens < 1 or graph.n_logits < 1:
        raise ValueError(
            "expected at least one layer, one token and one logit, got "
            f"{graph.n_layers}, {graph.n_tokens} and {graph.n_logits}"
        )
    if graph.features.shape[1] != 3:
        raise ValueError(f"features: expected [n, 3], got shape {list(graph.features.shape)}")
    _length("activations", graph.activations, graph.n_features)
    _length("logit_probs", graph.logit_probs, graph.n_logits)
    _length("remainder", graph.remainder, graph.n_nodes)
    for name in ("activations", "logit_probs", "remainder"):
        _finite(name, getattr(graph, name))
    if bool((graph.logit_probs < 0).any()) or float(graph.logit_probs.sum()) <= 0:
        raise ValueError(
            f"logit_probs: expected weights >= 0 with a sum > 0, got {graph.logit_probs.tolist()}"
        )
    if bool((graph.remainder < 0).any()):
        raise ValueError(f"remainder: expected numbers >= 0, got {float(graph.remainder.min())}")
    if not graph.n_features:
        return
    lowest, highest = graph.features.amin(dim=0).tolist(), graph.features.amax(dim=0).tolist()
    if min(lowest) < 0 or highest[0] >= graph.n_layers or highest[1] >= graph.n_tokens:
        raise ValueError(
            f"features: expected layers below {graph.n_layers}, positions below {graph.n_tokens} and numbers >= 0, "
            f"got {lowest} to {highest}"
        )
    key = graph.features[:, 0] * graph.n_tokens + graph.features[:, 1]
    index = graph.features[:, 2]
    ascending = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & (index[1:] > index[:-1]))
    if not bool(ascending.all()):
        at = int((~ascending).nonzero()[0])
        pair = graph.features[at : at + 2].tolist()
        raise ValueError(
            f"features: expected (layer, position, index) ascending without duplicates, got {pair} at {at}"
        )


def check_edges(graph: "Graph") -> None:
    """Row pointers, column order, and that every edge runs upwards. One pass over the edges in small chunks."""
    _length("row_ptr", graph.row_ptr, graph.n_nodes + 1)
    _length("columns", graph.columns, graph.n_edges)
    row_ptr, columns = graph.row_ptr.numpy(), graph.columns.numpy()
    if row_ptr[0] != 0 or row_ptr[-1] != graph.n_edges or bool((np.diff(row_ptr) < 0).any()):
        raise ValueError(
            f"row_ptr: expected to rise from 0 to {graph.n_edges}, got {row_ptr[0]} to {row_ptr[-1]}"
            + (" with falls between" if bool((np.diff(row_ptr) < 0).any()) else "")
        )
    if row_ptr[graph.logit_slice.start] != row_ptr[graph.error_slice.start]:
        raise ValueError("edges: expected none into errors and tokens, got some")
    if bool((graph.remainder[graph.error_slice.start : graph.logit_slice.start] > 0).any()):
        raise ValueError("remainder: expected 0 for errors and tokens, got more")
    _finite("values", graph.values)
    layer = graph.node_layer.numpy().astype(np.int32)
    for first_row, last_row in graph.row_blocks:
        for first, last in chunks(row_ptr, first_row, last_row):
            part = columns[row_ptr[first] : row_ptr[last]]
            if not part.size:
                continue
            if part.min() < 0 or part.max() >= graph.n_nodes:
                raise ValueError(
                    f"columns: expected node numbers below {graph.n_nodes}, got {part.min()} to {part.max()}"
                )
            if bool((layer[part] >= layer[first_row]).any()):
                raise ValueError(
                    "edges: expected sources in lower layers than their targets, got an edge into layer "
                    f"{layer[first_row]} from layer {layer[part].max()}"
                )
            rising = part[1:] > part[:-1]
            starts = row_ptr[first + 1 : last] - row_ptr[first]
            rising[starts[(starts > 0) & (starts < part.size)] - 1] = True  # a new row may start lower
            if not bool(rising.all()):
                raise ValueError("columns: expected ascending numbers within each row, got others")
