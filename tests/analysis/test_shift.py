"""Representation shift per class: against one document at a time, with planted truth, and what is refused."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from fasttc.analysis import read_classes, representation_shift
from fasttc.models import anatomy


@pytest.fixture
def labelled() -> tuple[list[list[int]], list[str]]:
    """Token ids of 24 documents of 2 to 13 tokens in three classes."""
    generator = torch.Generator().manual_seed(4)
    lengths = [2 + (5 * i) % 12 for i in range(24)]
    documents = [torch.randint(4, 61, (length,), generator=generator).tolist() for length in lengths]
    return documents, ["abc"[i % 3] for i in range(24)]


def alone(model, documents, pool) -> torch.Tensor:
    """[L + 1, n, D]: every document by itself, BOS in front."""
    found = []
    for document in documents:
        last: list[torch.Tensor] = []
        hook = model.get_submodule(anatomy(model).final_norm).register_forward_pre_hook(
            lambda module, args, last=last: last.append(args[0])
        )
        with torch.no_grad():
            ids = torch.tensor([[model.config.bos_token_id, *document]])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        hook.remove()
        stream = torch.stack([*states[:-1], last[0]])[:, 0].double()  # [L + 1, T, D]
        found.append(stream[:, 1:].mean(1) if pool == "mean" else stream[:, -1])
    return torch.stack(found, 1)


def test_equals_one_document_at_a_time(tiny_model, family, labelled):
    pool = "last" if family in ("gemma2", "gpt2", "llama") else "mean"
    documents, labels = labelled
    target, base = (tiny_model(family, seed=seed, dtype=torch.float64) for seed in (0, 1))
    report = representation_shift(target, base, documents, labels, pool=pool, context=32, batch_size=5)
    old, new = (alone(model, documents, pool) for model in (base, target))
    assert len(report.layers) == 4
    for layer, found in enumerate(report.layers):
        member = [[i for i, label in enumerate(labels) if label == name] for name in "abc"]
        within = [old[layer, i] - old[layer, i].mean(0) for i in member]
        spread = math.sqrt(sum(float(part.square().sum()) for part in within) / (24 - 3))
        moved = torch.stack([new[layer, i].mean(0) - old[layer, i].mean(0) for i in member])
        assert found.spread == pytest.approx(spread)
        for c, one in enumerate(found.classes):
            assert (one.name, one.documents) == ("abc"[c], 8)
            assert one.shift == pytest.approx(float(moved[c].norm()) / spread)
            assert one.own == pytest.approx(float((moved[c] - moved.mean(0)).norm()) / spread)
            assert one.plane_shift <= one.shift * (1 + 1e-9)
            cosines = torch.nn.functional.cosine_similarity(
                old[layer, member[c]], new[layer, member[c]], dim=1
            )
            assert one.cosine == pytest.approx(float(cosines.mean()))
        for side, points in ((found.silhouette_base, old[layer]), (found.silhouette_tuned, new[layer])):
            assert side == pytest.approx(silhouette(points, labels))


def silhouette(points, labels) -> float:
    """By the definition (Rousseeuw 1987), document by document."""
    scores = []
    for i, label in enumerate(labels):
        distance = (points - points[i]).norm(dim=1).tolist()
        means = {
            name: float(np.mean([distance[j] for j, other in enumerate(labels) if other == name and j != i]))
            for name in set(labels)
        }
        a, b = means[label], min(value for name, value in means.items() if name != label)
        scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def test_a_planted_shift_of_one_class(tiny_model):
    """The embedding of token 5 moves, and only class "moved" holds it: by two thirds of its tokens, at layer 0."""
    base = tiny_model("llama", dtype=torch.float64)
    target = copy.deepcopy(base)
    vector = torch.randn(32, dtype=torch.float64)
    target.get_submodule(anatomy(target).embed).weight.data[5] += vector
    still = [[10 + i, 11 + i, 12 + i] for i in range(20)]
    moved = [[5, 5, 12 + i] for i in range(20)]
    labels = ["moved"] * 20 + ["still"] * 20
    report = representation_shift(target, base, moved + still, labels, context=32)
    first = report.layers[0]
    by_name = {one.name: one for one in first.classes}
    size = float(vector.norm()) * 2 / 3 / first.spread
    assert by_name["moved"].shift == pytest.approx(size)
    assert by_name["still"].shift == 0
    assert by_name["still"].cosine == pytest.approx(1)
    for one in first.classes:  # half of the shift is common to both
        assert one.own == pytest.approx(size / 2)
        assert one.own > one.own_by_chance
    again = representation_shift(target, base, moved + still, labels, context=32)
    assert again.to_dict() == report.to_dict()
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_same_shift_of_all_is_nobodys_own(tiny_model, labelled):
    """Every embedding moves by the same vector: at layer 0 shifts are equal, and what is not shared is rounding."""
    documents, labels = labelled
    base = tiny_model("gpt2", dtype=torch.float64)
    target = copy.deepcopy(base)
    target.get_submodule(anatomy(target).embed).weight.data += 0.5
    first = representation_shift(target, base, documents, labels, context=32).layers[0]
    for one in first.classes:
        assert one.shift * first.spread == pytest.approx(0.5 * 32**0.5)
        assert one.own < 1e-9


def test_what_has_no_spread_is_not_defined(tiny_model):
    """The last token of every document is the same: at layer 0 nothing differs within a class."""
    base, target = tiny_model("llama"), tiny_model("llama", seed=1)
    documents = [[i, i + 1, 7] for i in range(8, 16)]
    report = representation_shift(target, base, documents, list("aabbaabb"), pool="last", context=32, draws=0)
    first = report.to_dict()["layers"][0]
    assert first["spread"] == 0
    assert [one["shift"] for one in first["classes"]] == [None, None]
    assert report.to_dict()["layers"][1]["classes"][0]["own_by_chance"] is None
    assert report.layers[1].classes[0].shift > 0


def test_of_large_classes_some_documents_are_drawn(tiny_model, labelled):
    documents, labels = labelled
    base, target = tiny_model("llama"), tiny_model("llama", seed=1)
    report = representation_shift(target, base, documents, labels, context=32, per_class=3, seed=2)
    assert [one.documents for one in report.layers[0].classes] == [3, 3, 3]
    other = representation_shift(target, base, documents, labels, context=32, per_class=3, seed=3)
    assert report.layers[1].spread != other.layers[1].spread


def test_documents_are_cut_at_the_context(tiny_model, labelled):
    documents, labels = labelled
    base, target = tiny_model("llama"), tiny_model("llama", seed=1)
    cut = representation_shift(target, base, documents, labels, context=5)
    same = representation_shift(target, base, [document[:4] for document in documents], labels, context=5)
    assert cut.to_dict() == same.to_dict()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a"] * 3, {}, "labels: expected one for each of 4 documents, got 3"),
        (["a"] * 4, {}, "labels: expected at least two classes, got a"),
        (["a", "a", "b", "c"], {}, "labels: expected at least two documents of each class, got one of b, c"),
        (list("aabb"), {"pool": "first"}, "pool: expected one of mean, last, got 'first'"),
        (list("aabb"), {"per_class": 1}, "per_class: expected an int >= 2, got 1"),
        (list("aabb"), {"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
        (list("aabb"), {"draws": -1}, "draws: expected an int >= 0, got -1"),
        (list("aabb"), {"context": 65}, "context: expected at most the model's 64 positions, got 65"),
    ],
)
def test_wrong_input(tiny_model, labels, options, message):
    base, target = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match=message):
        representation_shift(
            target, base, [[5, 6], [7, 8], [9, 10], [11, 12]], labels, **{"context": 32, **options}
        )


def test_the_same_model_twice(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="base: expected another model than the target"):
        representation_shift(model, model, [[5, 6]] * 4, list("aabb"))


def test_records_with_classes():
    records = [
        {"finding": "a b", "disease": 3, "where": ["x", "y"]},
        {"finding": "c", "disease": 4, "where": []},
    ]
    assert read_classes(records, text="{finding}", label="d{disease}") == (["a b", "c"], ["d3", "d4"])
    with pytest.raises(ValueError, match="class: expected one in record 1, got ''"):
        read_classes(records, text="{finding}", label="{where}")
    with pytest.raises(
        ValueError, match="text: expected the field 'name' in record 0; it has finding, disease, where"
    ):
        read_classes(records, text="{name}", label="{disease}")
