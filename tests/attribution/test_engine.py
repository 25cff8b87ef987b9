"""The parts of the engine, and that how the work is split never shows in the result."""

import copy

import pytest
import torch

import fasttc
from fasttc.attribution.attribute import _Options, attribute, attribute_many
from fasttc.attribution.collect import collect_rows
from fasttc.attribution.contract import Contraction
from fasttc.attribution.linearize import linearize
from fasttc.attribution.plan import Budget, Point, cohorts, make_budget
from fasttc.attribution.positions import Positions
from fasttc.attribution.pullback import Pullback
from fasttc.attribution.rows import EdgeWriter, Kept, RowBlock, segments
from fasttc.attribution.sources import find_sources
from fasttc.attribution.targets import Resolver
from fasttc.attribution.tokens import token_edges
from fasttc.attribution.trace import Sweep, feature_targets
from fasttc.models import float64_exact
from fasttc.models.linear import Unembedding, freeze


@pytest.fixture
def parts(tiny_model, random_set, prompt_ids):
    """linear maps, sources, frozen model of a Gemma-2 with skip connections, float64."""
    model = tiny_model("gemma2", dtype=torch.float64)
    tcs = random_set(model, "topk", skip=True, n_features=24)
    with float64_exact(model):
        frozen = freeze(model, prompt_ids, tcs.sites, dtype=torch.float64)
        return linearize(frozen, tcs), find_sources(frozen, tcs), frozen


def test_jacobian_products_are_adjoint(family, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, skip=True)
    layer = linearize(freeze(model, prompt_ids, tcs.sites, dtype=torch.float64), tcs).layers[1]
    resid, gradient = torch.randn(2, 9, 3, 32, dtype=torch.float64)
    after = resid + layer.attention_jvp(resid)
    after = after + layer.skip.jvp(resid if layer.parallel else after)
    back = gradient.clone()
    layer.vjp_(back)
    torch.testing.assert_close((after * gradient).sum((0, 2)), (resid * back).sum((0, 2)), rtol=1e-12, atol=0)
    late = resid.clone()
    late[:4] = 0
    torch.testing.assert_close(layer.attention_jvp(late)[4:], layer.attention_jvp(late[4:].contiguous(), 4))


@pytest.mark.parametrize("parallel", [False, True])
def test_factors_and_dense_gradients_agree(parts, parallel):
    linear, _, _ = parts
    positions = Positions.of(torch.tensor([1, 1, 3, 6, 8, 8, 8]))
    vectors = torch.randn(7, 32, dtype=torch.float64)
    factored, dense = Pullback(vectors, positions), Pullback(vectors, positions)
    factored._factors_are_cheaper = lambda layer: True
    dense._factors = None
    for layer in reversed(linear.layers[1:]):
        layer = copy.copy(layer)
        object.__setattr__(layer, "parallel", parallel)
        factored.through(layer)
        dense.through(layer)
        torch.testing.assert_close(factored.gradient, dense.gradient, rtol=0, atol=1e-12)
    assert factored._factors[1].shape[0] > 1
    for row, position in enumerate(positions):
        assert not bool(dense.gradient[position + 1 :, row].any())


def test_tokens_upwards_and_downwards_agree(parts):
    linear, sources, _ = parts
    groups = feature_targets(linear, sources)
    upwards = token_edges(linear, sources, groups, make_budget(None, torch.device("cpu")))
    sweep = Sweep(linear, sources, make_budget(None, torch.device("cpu")))
    for group, edges in zip(groups, upwards, strict=True):
        some = [group.rows.tolist().index(row) for row in group.rows.tolist()[::9]]  # few: they go downwards
        assert len(some) <= sources.n_layers * sources.n_tokens
        for number in some:
            block = sweep._trace(group, number, number + 1, None)
            length = group.positions[number] + 1
            torch.testing.assert_close(block.values[0, -length:], edges[number, :length], rtol=0, atol=1e-12)
            assert not bool(edges[number, length:].any())


@pytest.mark.parametrize("copy", [False, True])
def test_contraction_by_op_and_by_position_agree(parts, copy):
    _, sources, _ = parts
    layer = sources.layers[1]
    positions = Positions.of(torch.tensor([2, 4, 4, 7]))
    gradient = torch.randn(8, 4, 32, dtype=torch.float64)
    for row, position in enumerate(positions):
        gradient[position + 1 :, row] = 0
    for first in (0, 2):
        width = layer.before[8] - layer.before[first]
        by_op, by_position = torch.zeros(2, 4, width, dtype=torch.float64)
        Contraction(layer, by_op=True, copy=copy).write("feature", gradient, positions, by_op)
        Contraction(layer, by_op=False, copy=copy).write("feature", gradient, positions, by_position)
        torch.testing.assert_close(by_position, by_op, rtol=0, atol=1e-13)
        assert bool(by_op.any())


def test_causal_blocks(parts, monkeypatch):
    linear, _, _ = parts
    gradient = torch.randn(9, 4, 32, dtype=torch.float64)
    whole, split = gradient.clone(), gradient.clone()
    linear.layers[0].vjp_(whole)
    up = linear.layers[0].attention_jvp(gradient)
    monkeypatch.setattr("fasttc.attribution.linearize._CAUSAL_BLOCK", 4)
    linear.layers[0].vjp_(split)
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(linear.layers[0].attention_jvp(gradient), up)


def test_memory_budget_changes_nothing_but_rounding(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama", dtype=torch.float64)
    tcs = random_set(model)
    wide = fasttc.attribute(model, tcs, prompt_ids)
    narrow = fasttc.attribute(model, tcs, prompt_ids, memory_budget=60_000)
    assert torch.equal(wide.row_ptr, narrow.row_ptr)
    assert torch.equal(wide.columns, narrow.columns)
    torch.testing.assert_close(narrow.values, wide.values, rtol=0, atol=1e-13)


def test_same_bits_every_time(tiny_model, random_set, prompt_ids):
    model = tiny_model("gemma3")
    tcs = random_set(model, "jumprelu", skip=True)
    for options in ({}, {"max_feature_nodes": 30, "refresh": 8}, {"edge_share": 0.7}):
        first, second = (fasttc.attribute(model, tcs, prompt_ids, **options) for _ in range(2))
        assert torch.equal(first.columns, second.columns)
        assert torch.equal(first.values, second.values)


def test_top_mass_rows(tiny_model, random_set, prompt_ids):
    model = tiny_model("qwen3")
    tcs = random_set(model, "relu", n_features=16)
    whole = fasttc.attribute(model, tcs, prompt_ids)
    part = fasttc.attribute(model, tcs, prompt_ids, edge_share=0.8)
    exact, kept = whole.dense().double(), part.dense().double()
    assert part.n_edges < 0.7 * whole.n_edges
    assert torch.equal(kept[kept != 0], exact[kept != 0])
    torch.testing.assert_close(part.row_mass(), whole.row_mass(), rtol=1e-6, atol=1e-9)
    mass, stored = exact.abs().sum(1), kept.abs().sum(1)
    smallest = torch.where(kept == 0, torch.inf, kept.abs()).amin(1)
    rows = mass > 0
    assert bool((stored[rows] >= 0.8 * mass[rows] * (1 - 1e-6)).all())
    assert bool((stored[rows] - smallest[rows] <= 0.8 * mass[rows] * (1 + 1e-6)).all())  # no edge too many
    lower, upper = part.score_bounds()
    for low, true, high in zip(lower, whole.scores(), upper, strict=True):
        assert low <= true <= high
    missing = whole.influence() - part.influence()
    assert bool((missing >= -1e-6).all())
    assert bool((missing <= part.influence_bound() + 1e-6).all())
    assert float(missing.max()) > 1e-3  # what is not stored matters here


def test_adaptive_choice_is_by_influence(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama", dtype=torch.float64)
    tcs = random_set(model)
    whole = fasttc.attribute(model, tcs, prompt_ids)
    # Refreshed after each feature, the choice is greedy: the next one is the most influential given the rows so far.
    greedy = fasttc.attribute(model, tcs, prompt_ids, max_feature_nodes=6, refresh=1)
    shares = whole.dense().abs()
    shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-10)
    chosen: list[int] = []
    start = torch.zeros(whole.n_nodes, dtype=torch.float64)
    start[whole.logit_slice] = whole.logit_probs
    for _ in range(6):
        known = torch.zeros_like(shares)
        rows = [*chosen, *range(whole.logit_slice.start, whole.n_nodes)]
        known[rows] = shares[rows]
        arrived, passed = torch.zeros_like(start), start
        for _ in range(whole.n_layers + 1):
            passed = passed @ known
            arrived = arrived + passed
        arrived[chosen] = -1
        chosen.append(int(arrived[: whole.n_features].argmax()))
    assert torch.equal(greedy.features, whole.features[sorted(chosen)])


@pytest.mark.parametrize("options", [{}, {"max_feature_nodes": 30, "refresh": 8}], ids=["all", "ranked"])
def test_progress_adds_up(parts, options):
    linear, sources, frozen = parts
    rows, mean = torch.randn(61, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    roots = Resolver(linear, sources, frozen.final, Unembedding(rows, None, None, mean), None)
    shares: list[float] = []
    collect_rows(
        Sweep(linear, sources, make_budget(60_000, torch.device("cpu"))),
        roots.roots([3, 4], 10, 0.95),
        share=1.0,
        limit=options.get("max_feature_nodes"),
        refresh=options.get("refresh", 2048),
        progress=shares.append,
    )
    assert len(shares) > 3
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1.0)


def test_all_features_when_the_cap_is_higher(tiny_model, random_set, prompt_ids):
    model = tiny_model("llama")
    tcs = random_set(model)
    whole = fasttc.attribute(model, tcs, prompt_ids)
    capped = fasttc.attribute(model, tcs, prompt_ids, max_feature_nodes=whole.n_features)
    assert torch.equal(capped.features, whole.features)
    assert torch.equal(capped.values, whole.values)


def test_cohorts_cover_every_target_once_within_the_budget():
    positions = sorted([0, 0, 1, 5, 5, 5, 6, 30, 31, 31, 100, 100, 101, 101, 101] * 7)
    seen = []
    for start, stop in cohorts(
        positions, 8, 4, lambda length: 40 * length, Budget(limit=20_000, preferred=1 << 14)
    ):
        assert start < stop
        assert (stop - start) * 40 * (positions[stop - 1] + 1) <= 20_000
        seen += range(start, stop)
    assert seen == list(range(len(positions)))


def test_writer_orders_rows_and_drops_zeros(parts):
    _, sources, _ = parts
    point = Point(1, attention_first=True)
    width = [part.stop for part in segments(sources, point, range(3, 6))][-1]
    values = torch.arange(1.0, 2 * width + 1, dtype=torch.float64).view(2, width)
    values[0, 2] = 0
    block = RowBlock(point, torch.tensor([7, 4]), Positions.of(torch.tensor([3, 5])), values)
    writer = EdgeWriter(sources, Kept(None, sources.n_features), share=1, capacity=1)
    writer.write(block)
    numbers = torch.full((8,), -1)
    numbers[[4, 7]] = torch.tensor([0, 1])
    rows = writer.finish(numbers)
    counts, columns, stored, remainder = rows.counts, rows.columns, rows.values, rows.remainder
    assert rows.numbers.tolist() == [0, 1]
    assert counts[0] == width
    assert torch.equal(stored[:width], values[1])
    assert counts[1] < width - 1  # ends at its own position, and one edge is zero
    assert 0.0 not in stored.tolist()
    assert remainder.tolist() == [0.0, 0.0]
    ends = counts.cumsum(0).tolist()
    assert all(bool((columns[a:b].diff() > 0).all()) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def test_options_have_the_defaults_of_attribute():
    import dataclasses
    import inspect

    fields = {field.name: field.default for field in dataclasses.fields(_Options)}
    keywords = inspect.signature(attribute).parameters.values()
    assert fields == {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}


def test_several_prompts_equal_single_ones(tiny_model, random_set, prompt_ids):
    model = tiny_model("gpt2")
    tcs = random_set(model)
    prompts = [prompt_ids, prompt_ids[:4], prompt_ids.flip(0)]
    together = list(attribute_many(model, tcs, prompts, max_logits=2))
    for prompt, graph in zip(prompts, together, strict=True):
        alone = attribute(model, tcs, prompt, max_logits=2)
        assert torch.equal(alone.features, graph.features)
        assert torch.equal(alone.values, graph.values)
