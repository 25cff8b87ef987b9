"""Features shared out over processes: winners, outputs and gradients are those of all of them in one place."""

import pytest
import torch

from fasttc.nn import Transcoder
from fasttc.training.distributed import Processes
from fasttc.training.sharded import ShardedTranscoder

CASES = [  # activation, F, k, skip, relu, ties
    ("topk", 37, 5, False, True, False),
    ("topk", 37, 5, True, False, True),
    ("topk", 16, 4, False, True, True),
    ("topk", 5, 4, False, True, False),  # a process has fewer features than k
    ("topk", 3, 3, True, True, False),  # K = F
    ("topk", 64, 1, False, False, True),
    ("jumprelu", 37, None, True, True, False),
    ("relu", 5, None, False, True, True),
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
    assert torch.equal(sharded.encode(x).to_dense(), whole.encode(x).to_dense())
    torch.testing.assert_close(sharded(x), whole(x))
    assert ShardedTranscoder.from_config(whole.config).W_enc.shape == (16, 6)


def test_what_cannot_be_shared_out():
    group = Processes()
    group.size = 9
    with pytest.raises(ValueError, match="n_features: expected a feature for each of 9 processes, got 8"):
        ShardedTranscoder.of(Transcoder(4, 8, k=2), group)
    with pytest.raises(ValueError, match=r"activation: expected topk, jumprelu or relu .*, got 'batchtopk'"):
        ShardedTranscoder.of(Transcoder(4, 8, activation="batchtopk", k=2))
