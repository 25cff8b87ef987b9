"""Splits are disjoint, rows hold every document once and whole, streams resume where they stood."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fasttc.training.data import TokenData, open_data, split_documents
from fasttc.training.packing import cut, pack

BOS = 2


def documents(n=40, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 61, rng.integers(1, longest)).tolist() for _ in range(n)]


def make(docs=None, **options):
    options = {"context": 16, "bos_id": BOS} | options
    return TokenData(docs if docs is not None else documents(), **options)


def pieces_of(batches):
    """The documents of blocks, read back from ids and positions."""
    found = []
    for batch in batches:
        for ids, positions, mask in zip(batch.input_ids, batch.position_ids, batch.mask, strict=True):
            for token, position, real in zip(ids.tolist(), positions.tolist(), mask.tolist(), strict=True):
                if position == 0:
                    found.append([])
                if position == 0 or real:
                    found[-1].append(token)
    return [piece for piece in found if len(piece) > 1]


def test_split_is_exact_disjoint_and_complete():
    docs = documents(200)
    split = split_documents(docs, (0.8, 0.15, 0.05), seed=3)
    assert {name: len(part) for name, part in split.items()} == {"train": 160, "validation": 30, "test": 10}
    assert sorted(i for part in split.values() for i in part) == list(range(200))
    assert split == split_documents(docs, (0.8, 0.15, 0.05), seed=3)
    assert split != split_documents(docs, (0.8, 0.15, 0.05), seed=4)


def test_split_does_not_depend_on_order_and_keeps_copies_together():
    docs = ["a", "b", "c", "d", "e", "f"] * 5
    split = split_documents(docs, (0.5, 0.3, 0.2))
    content = {name: {docs[i] for i in part} for name, part in split.items()}
    assert not content["train"] & content["validation"]
    assert not content["train"] & content["test"]
    assert not content["validation"] & content["test"]
    shuffled = docs[::-1]
    again = split_documents(shuffled, (0.5, 0.3, 0.2))
    assert {name: {shuffled[i] for i in part} for name, part in again.items()} == content


def test_small_sets_still_have_three_parts():
    assert all(split_documents(["a", "b", "c"]).values())
    data = make([[5, 6]])
    with pytest.raises(ValueError, match="expected documents for validation, got none of 1"):
        data.stream("validation", 2)
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        data.indices("dev")
    with pytest.raises(ValueError, match="with sum 1"):
        split_documents(["a"], (0.5, 0.1, 0.1))


@pytest.mark.parametrize("bos", [None, BOS])
def test_cut_gives_every_piece_a_bos(bos):
    pieces = cut(np.arange(10, 33), 8, bos)
    head = [] if bos is None else [bos]
    step = 8 - len(head)
    assert [p.tolist() for p in pieces] == [
        head + list(range(10, 33))[i : i + step] for i in range(0, 23, step)
    ]


def test_pack_keeps_pieces_whole_and_wastes_little():
    rng = np.random.default_rng(0)
    pieces = [np.full(n, i + 1) for i, n in enumerate(rng.integers(1, 33, 500))]
    rows = pack(pieces, 32, 0)
    seen = {}
    for ids, positions, real in zip(rows.ids, rows.positions, rows.real, strict=True):
        for token in set(ids[real].tolist()):
            assert token not in seen, "a piece lies in one row"
            seen[token] = positions[ids == token].tolist()
    assert seen == {i + 1: list(range(len(p))) for i, p in enumerate(pieces)}
    halves = sum(len(p) > 16 for p in pieces)  # each needs a row of its own, whatever the rule
    assert len(rows) <= 1.04 * max(halves, sum(map(len, pieces)) / 32)
    assert (rows.ids[~rows.real] == 0).all()


def test_one_pass_gives_every_document_of_the_split_once():
    data = make(documents(60))
    for split in ("train", "validation", "test"):
        batches = list(data.batches(split, 3))
        assert all(b.input_ids.shape == (3, 16) for b in batches[:-1])
        expected = [[BOS, *d[i : i + 15]] for j in data.splits[split] for d in [data.documents[j]]
                    for i in range(0, len(d), 15)]  # fmt: skip
        assert sorted(pieces_of(batches)) == sorted(expected)
        assert sum(b.n_tokens for b in batches) == sum(map(len, expected))
    assert len(list(data.batches("train", 3, max_tokens=1))) == 1


def test_labels_and_mask():
    batch = next(make(documents(60)).batches("train", 4))
    ids, positions, labels, mask = (
        t.tolist() for t in (batch.input_ids, batch.position_ids, batch.labels, batch.mask)
    )
    for row in range(4):
        for t in range(16):
            starts = positions[row][t] == 0
            assert (ids[row][t] == BOS) <= starts
            if starts:
                assert not mask[row][t]
            continues = t + 1 < 16 and positions[row][t + 1] == positions[row][t] + 1 and mask[row][t + 1]
            assert labels[row][t] == (ids[row][t + 1] if continues else -100)
    assert any(any(row) for row in mask)


def test_without_bos_the_first_token_is_masked():
    batch = next(make(bos_id=None).batches("train", 4))
    assert not batch.mask[batch.position_ids == 0].any()
    assert batch.mask.sum() > 20


def test_a_bos_already_there_is_not_doubled():
    data = make([[BOS, 5, 6], [7, 8], [9, 10]], fractions=(1, 0, 0))
    assert sorted(pieces_of(data.batches("train", 1))) == [[BOS, 5, 6], [BOS, 7, 8], [BOS, 9, 10]]


def test_stream_shows_every_document_once_per_epoch():
    data = make(documents(60))
    per_epoch = len(pieces_of(data.batches("train", 1)))
    stream = data.stream("train", 1, seed=5)
    first, second = [], []
    while stream.epoch == 0:
        first.append(stream.next())
    while len(pieces_of(second)) < per_epoch:
        second.append(stream.next())
    last = first.pop()  # the epoch number turns with the first block of the next one
    assert sorted(pieces_of(first)) == sorted(pieces_of(data.batches("train", 1)))
    assert pieces_of([last, *second])[:per_epoch] != pieces_of(first)


@pytest.mark.parametrize("after", [0, 1, 7, 23])
def test_stream_resumes_exactly(after, monkeypatch):
    monkeypatch.setattr("fasttc.training.data._POOL_ROWS", 4)
    data = make(documents(60))
    whole = data.stream("train", 3, seed=1)
    for _ in range(after):
        whole.next()
    resumed = make(documents(60)).stream("train", 3, seed=1)
    resumed.restore(whole.state())
    for _ in range(20):
        one, two = whole.next(), resumed.next()
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.labels, two.labels)
    assert whole.state() == resumed.state()


def test_streams_of_other_seeds_differ():
    data = make(documents(60))
    assert not torch.equal(
        data.stream("train", 8, seed=0).next().input_ids, data.stream("train", 8, seed=1).next().input_ids
    )


def test_tokenizer_and_errors(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    texts = [f"t{i} t{i + 1} t{i + 2}" for i in range(4, 30)]
    data = open_data(model, texts, tiny_tokenizer, context=8)
    assert all(p[0] == BOS and p[2] == p[1] + 1 for p in pieces_of(data.batches("train", 2)))
    assert open_data(model, data) is data

    class Plain:
        bos_token_id = BOS

        def encode(self, text):
            return [int(word[1:]) for word in text.split()]

    plain = open_data(model, texts, Plain(), context=8)
    assert pieces_of(plain.batches("train", 2)) == pieces_of(data.batches("train", 2))
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        open_data(model, texts, context=8)
    with pytest.raises(ValueError, match="at most the model's 64 positions, got 65"):
        open_data(model, texts, tiny_tokenizer, context=65)
    with pytest.raises(ValueError, match="below the model's vocabulary of 61, got 61"):
        next(open_data(model, [[61, 3]], context=8, fractions=(1, 0, 0)).batches("train", 1))
    with pytest.raises(ValueError, match="int >= 2"):
        make(context=1)
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="batch_size: expected an int >= 1"):
            make().stream("train", bad)
        with pytest.raises(ValueError, match="batch_size: expected an int >= 1"):
            next(make().batches("train", bad))


def test_packed_documents_do_not_see_each_other(tiny_model, family):
    """The claim of TokenBatch: hidden states in a packed row equal those of each document alone."""
    model = tiny_model(family)
    data = make(documents(30, longest=9), context=24, fractions=(1, 0, 0))
    batch = next(data.batches("train", 4))
    assert (batch.position_ids == 0).sum() > 8
    with torch.no_grad():
        packed = model(**batch.model_inputs).logits
        checked = 0
        for row in range(4):
            starts = [*(batch.position_ids[row] == 0).nonzero()[:, 0].tolist(), 24]
            for start, stop in pairwise(starts):
                alone = model(batch.input_ids[row : row + 1, start:stop], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-4, atol=1e-4)
                checked += 1
    assert checked > 8
