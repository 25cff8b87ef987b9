"""Features shared out over processes: winners, outputs and gradients are those of all of them in one place."""

import pytest
import torch

from fasttc.nn import Transcoder
from fasttc.training.distributed import Processes
from fasttc.training.sharded import ShardedTranscoder

CASES = [  # F, k, skip, relu, ties
    (37, 5, False, True, False),
    (37, 5, True, False, True),
    (16, 4, False, True, True),
    (5, 4, False, True, False),  # a process has fewer features than k
    (3, 3, True, True, False),  # K = F
    (64, 1, False, False, True),
]


@pytest.mark.parametrize("size", [2, 3])
def test_as_the_whole_transcoder(fork, tmp_path, size):
    jobs = [{"log": str(tmp_path / f"{rank}.log"), "cases": CASES} for rank in range(size)]
    for code, printed, _ in fork("_sharded.py", jobs):
        assert code == 0, printed


def test_one_process_holds_all():
    whole = Transcoder(6, 16, k=3)
    sharded = ShardedTranscoder.of(whole)
    x = torch.randn(4, 6)
    assert torch.equal(sharded.encode(x).indices, whole.encode(x).indices)
    torch.testing.assert_close(sharded(x), whole(x))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ShardedTranscoder.of(Transcoder(4, 8, activation="relu")),
     "activation: expected 'topk' for shared-out features, got 'relu'"),
    (lambda: ShardedTranscoder(Transcoder(4, 8, k=2), 9, 2),
     "local: expected 9 of 9 features for process 0 of 1, got 8"),
    (lambda: ShardedTranscoder(Transcoder(4, 8, k=2), 8, 9),
     "n_features: expected at least k = 9 and a feature for each of 1 processes, got 8"),
])  # fmt: skip
def test_wrong_parts(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_more_processes_than_features():
    group = Processes()
    group.size = 9
    with pytest.raises(ValueError, match="a feature for each of 9 processes, got 8"):
        ShardedTranscoder.of(Transcoder(4, 8, k=2), group)
