"""SparseActs: both layouts say the same as the dense matrix they stand for."""

import pytest
import torch

from fasttc.ops import SparseActs
from fasttc.testing import PATTERNS, draw_acts

LAYOUTS = pytest.mark.parametrize("csr", [False, True], ids=["padded", "csr"])


def dense_by_hand(acts: SparseActs) -> torch.Tensor:
    dense = torch.zeros(acts.n_tokens, acts.n_features, dtype=acts.values.dtype)
    for token, feature, value in zip(
        acts.tokens.reshape(-1).tolist(),
        acts.indices.reshape(-1).tolist(),
        acts.values.reshape(-1),
        strict=True,
    ):
        dense[token, feature] += value
    return dense


@LAYOUTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_dense(pattern, csr):
    acts = draw_acts(13, 4, 9, pattern=pattern, csr=csr, dtype=torch.float64)
    torch.testing.assert_close(acts.to_dense(), dense_by_hand(acts), rtol=0, atol=0)


@LAYOUTS
def test_views_of_the_same_activations_agree(csr):
    acts = draw_acts(13, 4, 9, csr=csr)
    acts.values.clamp_(min=0)  # closes some slots
    assert bool((acts.values == 0).any())
    dense = acts.to_dense()
    token, feature = dense.nonzero(as_tuple=True)
    for got, expected in zip(acts.active(), (token, feature, dense[token, feature]), strict=True):
        assert got.tolist() == expected.tolist()
        assert got.dtype == expected.dtype
    assert acts.l0().tolist() == (dense != 0).sum(1).tolist()
    compact = acts.to_csr()
    assert compact.is_csr
    assert compact.row_ptr is not None
    assert compact.row_ptr.diff().tolist() == (dense != 0).sum(1).tolist()
    assert bool((compact.values != 0).all())
    assert torch.equal(compact.to_dense(), dense)
    assert compact.to_csr() is compact
    for row, (indices, values) in zip(dense, acts, strict=True):
        assert indices.tolist() == row.nonzero()[:, 0].tolist()
        assert values.tolist() == row[row != 0].tolist()


@LAYOUTS
def test_leading_shape(csr):
    flat = draw_acts(6, 2, 5, csr=csr)
    acts = SparseActs(flat.values, flat.indices, 5, (2, 3), flat.row_ptr)
    assert len(acts) == acts.n_tokens == 6
    assert acts.to_dense().shape == (2, 3, 5)
    assert acts.l0().shape == (2, 3)
    one = draw_acts(1, 2, 5, csr=csr)
    single = SparseActs(one.values, one.indices, 5, (), one.row_ptr)
    assert single.to_dense().shape == (5,)
    assert single.l0().shape == ()


@LAYOUTS
def test_empty_batch(csr):
    acts = draw_acts(0, 2, 5, csr=csr)
    assert acts.to_dense().shape == (0, 5)
    assert acts.l0().shape == (0,)
    assert list(acts) == []
    assert acts.to_csr().n_tokens == 0


@LAYOUTS
def test_gradients_pass_through_to_dense_and_to_csr(csr):
    acts = draw_acts(6, 2, 5, csr=csr, dtype=torch.float64)
    acts.values.requires_grad_()
    weights = torch.arange(30, dtype=torch.float64).reshape(6, 5)
    expected = weights[acts.tokens, acts.indices.long()]
    for view in (acts, acts.to_csr()):
        (grad,) = torch.autograd.grad((view.to_dense() * weights).sum(), acts.values)
        assert grad.tolist() == expected.tolist()
    assert not acts.detach().values.requires_grad
