"""Rows that wait: beside the sweep while there is room, then in a file, and the graph is the same."""

from pathlib import Path

import torch

import fasttc
from fasttc.attribution import collect
from fasttc.attribution.shelf import Shelf


def test_what_does_not_fit_goes_to_a_file_that_disappears():
    tensors = [torch.randn(3, n, dtype=dtype) for n in (5, 0, 7) for dtype in (torch.float32, torch.float64)]
    with Shelf(3 * 5 * 4) as shelf:
        kept = [shelf.put(tensor) for tensor in tensors]
        assert kept[0] is tensors[0]
        assert shelf.away == sum(tensor.nbytes for tensor in tensors[1:])
        folder = shelf._folder.name
        for before, after in zip(tensors, kept, strict=True):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        transposed = tensors[5].T
        assert torch.equal(shelf.put(transposed), transposed)
    assert torch.equal(kept[5], tensors[5])  # what is still in use stays readable
    assert not Path(folder).exists()


def test_without_a_limit_nothing_moves():
    tensor = torch.ones(4)
    with Shelf(None) as shelf:
        assert shelf.put(tensor) is tensor
    assert shelf.away == 0


def test_ranked_rows_in_a_file_give_the_same_graph(tiny_model, random_set, prompt_ids, monkeypatch):
    model = tiny_model("gemma2")
    tcs = random_set(model, n_features=24)
    shelves = []

    class Watched(Shelf):
        def __init__(self, limit):
            super().__init__(limit and 1000)
            shelves.append(self)

    monkeypatch.setattr(collect, "Shelf", Watched)
    options = {"max_feature_nodes": 40, "refresh": 8, "memory_budget": 60_000}
    away = fasttc.attribute(model, tcs, prompt_ids, **options)
    assert shelves[0].away > 0
    monkeypatch.setattr(Watched, "put", lambda self, tensor: tensor)
    expected = fasttc.attribute(model, tcs, prompt_ids, **options)
    for part in ("features", "columns", "values"):
        assert torch.equal(getattr(away, part), getattr(expected, part))
