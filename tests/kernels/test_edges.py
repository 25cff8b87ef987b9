"""The edges kernel against the einsum in float64: groups of every size, causal skipping, dtypes, strides."""

import pytest
import torch
from torch import Tensor

from fasttc.kernels._launch import config
from fasttc.kernels.edges import launch_edges
from fasttc.ops import reference
from fasttc.testing import assert_same_bits, assert_within_budget, draw, poison_empty

# Two specialisations of a kernel may fuse multiplications and additions differently on a GPU.
COMPILED_APART = {"rtol": 2e-6, "atol": 2e-6}
SMALL = config(num_warps=1, num_stages=1, BLOCK_B=16, BLOCK_J=16, BLOCK_D=16, PRECISION="ieee")
SHAPES = [  # B, T, D, n, F
    pytest.param((1, 1, 1, 1, 1), id="one-of-each"),
    pytest.param((7, 5, 37, 23, 13), id="primes"),
    pytest.param((33, 3, 70, 40, 50), id="odd-of-blocks"),
    pytest.param((2, 40, 16, 9, 11), id="more-tokens-than-entries"),
    pytest.param((3, 2, 16, 0, 5), id="no-entries"),
    pytest.param((0, 2, 16, 3, 5), id="no-targets"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def integers(below: int, n: int, seed: int) -> Tensor:
    return torch.randint(0, below, (n,), generator=torch.Generator().manual_seed(seed), device="cpu").to(
        torch.get_default_device()
    )


def problem(shape, left=torch.float32, right=torch.float32, kind="normal") -> tuple[Tensor, ...]:
    b, t, d, n, f = shape
    features, positions = integers(f, n, seed=1), integers(t, n, seed=2).sort().values
    activations = draw("normal", n, seed=4)
    return (
        draw(kind, b, t, d, dtype=left),
        draw("normal", f, d, dtype=right, seed=3),
        features,
        positions,
        activations,
    )


def run(*arguments, config=SMALL) -> Tensor:
    with poison_empty():
        return launch_edges(*arguments, config=config)


def check(got: Tensor, G, W, features, positions, activations) -> None:
    oracle, eager = (
        reference.edges(G.to(t), W.to(t), features, positions, activations.to(t))
        for t in (torch.float64, torch.float32)
    )
    size = reference.edges(
        G.double().abs(), W.double().abs(), features, positions, activations.double().abs()
    )
    assert_within_budget(got, oracle, eager, magnitude=float(size.max()) if size.numel() else 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape):
    problem_ = problem(shape)
    check(run(*problem_), *problem_)


@pytest.mark.parametrize("right", DTYPES)
@pytest.mark.parametrize("left", DTYPES)
def test_every_pair_of_dtypes_with_the_shipped_config(left, right):
    problem_ = problem((5, 4, 40, 17, 19), left, right, kind="heavy_tailed")
    check(run(*problem_, config=None), *problem_)


@pytest.mark.parametrize("positions", ["all-first", "all-last", "one-each", "gaps"])
def test_groups_of_every_size(positions):
    G, W, features, _, activations = problem((3, 40, 16, 40, 9))
    chosen = {
        "all-first": torch.zeros(40, dtype=torch.int64),
        "all-last": torch.full((40,), 39),
        "one-each": torch.arange(40),
        "gaps": torch.tensor([0] * 17 + [5] * 16 + [39] * 7),
    }[positions]
    check(run(G, W, features, chosen, activations), G, W, features, chosen, activations)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("order", ["ascending", "mixed"])
def test_causal_skipping_leaves_exact_zeros(order, dtype):
    G, W, features, positions, activations = problem((37, 6, 40, 50, 9))
    targets = integers(6, 37, seed=2).to(dtype)
    targets = targets.sort().values if order == "ascending" else targets
    later = torch.arange(6)[None] > targets[:, None]
    G[later] = 0
    whole = run(G, W, features.to(dtype), positions.to(dtype), activations)
    G[later] = torch.nan
    skipped = run(G, W, features.to(dtype), positions.to(dtype), activations, targets)
    after = positions[None] > targets[:, None]
    assert_same_bits(skipped[after], torch.zeros(int(after.sum())))
    torch.testing.assert_close(skipped[~after], whole[~after], **COMPILED_APART)


def test_tiles_before_their_token_read_nothing():
    G, W, features, _, activations = problem((16, 3, 32, 20, 9))
    G[:, 2], W[:] = torch.nan, torch.nan
    positions, targets = torch.full((20,), 2), torch.zeros(16, dtype=torch.int64)
    assert_same_bits(run(G, W, features, positions, activations, targets), torch.zeros(16, 20))


def test_gradients_with_other_strides_are_read_in_place():
    G, W, *rest = problem((5, 4, 40, 17, 19))
    turned = G.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert_same_bits(run(turned, W, *rest), run(G, W, *rest))
    wide = torch.cat([W, W], 1)
    assert_same_bits(run(G, wide[:, :40], *rest), run(G, W, *rest))


def test_the_same_bits_every_time_and_in_any_company():
    G, W, features, positions, activations = problem((5, 4, 40, 30, 19))
    first = run(G, W, features, positions, activations)
    for _ in range(9):
        assert_same_bits(run(G, W, features, positions, activations), first)
    kept = torch.arange(0, 30, 3)
    fewer = run(G[[3, 1]], W, features[kept], positions[kept], activations[kept])
    assert_same_bits(fewer, first[[3, 1]][:, kept])


def test_gradients_and_decoders_beyond_2_to_the_31_elements(huge, overflow_checked):
    d = 4096
    half = 2**31 // d
    G, W = huge(3, half // 2, d, dtype=torch.float16), huge(half + 9, d, dtype=torch.float16)
    features, positions = torch.tensor([half + 8, 0]), torch.tensor([0, half // 2 - 1])
    G[:, positions] = draw("normal", 3, 2, d, dtype=torch.float16)
    W[features] = draw("normal", 2, d, dtype=torch.float16, seed=3)
    activations = draw("normal", 2, seed=4)
    wide = config(num_warps=1, num_stages=1, BLOCK_B=16, BLOCK_J=16, BLOCK_D=1024, PRECISION="ieee")
    token = torch.tensor([0, 1])
    compact = (G[:, positions], W[features], token, token, activations)
    check(_only_two_tokens(G, W, features, positions, activations, wide), *compact)


def _only_two_tokens(G, W, features, positions, activations, wide) -> Tensor:
    """Edges of two far positions: with n / BLOCK_J + T tiles, most of 2^18 tokens would be empty programs."""
    offset = G[:, int(positions[1]) :]
    first = launch_edges(G[:, :1], W, features[:1], positions[:1], activations[:1], config=wide)
    second = launch_edges(offset, W, features[1:], positions[1:] * 0, activations[1:], config=wide)
    return torch.cat([first, second], 1)
