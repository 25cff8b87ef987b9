"""Which tokens and features an Intervention concerns; random sets of the same size."""

import pytest
import torch

from fasttc.attribution import Intervention, random_control


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [2, 3, 4, 5, 6]),  # two positions are zeroed
        (0, [0]),
        (-1, [4]),
        (6, [6]),
        ([1, -2, 1], [1, 3]),
        (slice(None), [0, 1, 2, 3, 4, 5, 6]),
        (slice(3, None), [3, 4, 5, 6]),
        (slice(-2, None), [3, 4, 5, 6]),
        (slice(1, -1), [1, 2, 3]),
        (slice(4, 2), []),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 3, 6])
def test_positions_of_a_prompt_of_five_and_two_more(positions, expected, start):
    intervention = Intervention(0, 1, positions)
    found = intervention.reached(start, 7 - start, prompt=5, zeroed=2)
    assert (found.nonzero()[:, 0] + start).tolist() == [
        position for position in expected if position >= start
    ]


def test_actions():
    old = torch.tensor([0.0, 1.5])
    assert Intervention(0, 1).applied(old).tolist() == [0, 0]
    assert Intervention(0, 1, action="set", value=2).applied(old).tolist() == [2, 2]
    assert Intervention(0, 1, action="scale", value=-1).applied(old).tolist() == [0, -1.5]
    assert Intervention(0, 1, action="add", value=0.5).applied(old).tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "layer: expected an int >= 0, got -1", (-1, 0)),
        (TypeError, "layer: expected an int, got str", ("1", 0)),
        (ValueError, "features: expected at least one, got none", (0, [])),
        (ValueError, "features: expected numbers >= 0, got -3", (0, [1, -3])),
        (TypeError, "features: expected ints, got float", (0, [1.0])),
        (ValueError, "positions: expected at least one", (0, 1, [])),
        (ValueError, "positions: expected a slice without step", (0, 1, slice(0, 4, 2))),
        (ValueError, "action: expected one of set, scale, add, got 'zero'", (0, 1, None, "zero")),
        (TypeError, "value: expected a number, got str", (0, 1, None, "set", "1")),
        (ValueError, "value: expected a finite number, got inf", (0, 1, None, "set", float("inf"))),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        Intervention(*arguments)


def test_control_has_the_same_shape_and_other_features(tiny_model, random_set):
    tcs = random_set(tiny_model("llama"))
    given = [Intervention(0, [3, 4, 5], -1, "scale", 2.0), Intervention(2, 7), Intervention(0, [9], 2)]
    control = random_control(given, tcs, seed=1)
    assert [(c.layer, c.positions, c.action, c.value) for c in control] == [
        (c.layer, c.positions, c.action, c.value) for c in given
    ]
    assert [len(c.features) for c in control] == [3, 1, 1]
    in_layer_0 = {*control[0].features, *control[2].features}
    assert len(in_layer_0) == 4
    assert not in_layer_0 & {3, 4, 5, 9}
    assert random_control(given, tcs, seed=1) == control
    assert random_control(given, tcs, seed=2) != control


def test_control_matches_firing_rates(tiny_model, random_set):
    tcs = random_set(tiny_model("llama"))
    rates = [torch.linspace(0, 1, 40).pow(2) for _ in tcs]
    for seed in range(10):
        [control] = random_control([Intervention(1, [0, 39])], tcs, seed=seed, rates=rates)
        low, high = control.features
        assert 1 <= low <= 8
        assert 31 <= high <= 38
    with pytest.raises(ValueError, match="rates: expected one tensor"):
        random_control([Intervention(1, 0)], tcs, rates=rates[:2])


def test_control_needs_other_features(tiny_model, random_set):
    tcs = random_set(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"as many other features in layer 1 \(40 in all\)"):
        random_control([Intervention(1, range(21))], tcs)
    with pytest.raises(ValueError, match="named features, got all of layer 0"):
        random_control([Intervention(0, None)], tcs)
