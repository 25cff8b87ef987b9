"""Training adapters: the four losses against one sum by hand, what is trained, reports, bad input."""

import copy
import math

import pytest
import torch

from fasttc.models import adapter_sites, anatomy, hybrid
from fasttc.nn import AdapterSet, TranscoderAdapter
from fasttc.testing import assert_same_bits, assert_within_budget
from fasttc.training import Interrupted, train_adapters
from fasttc.training.adapter_quality import AdapterQuality
from fasttc.training.bridging import AdapterObjective, AdapterTask, comparison
from fasttc.training.distributed import Processes
from fasttc.training.loop import Run
from fasttc.training.packing import NO_LABEL

OPTIONS = {
    "batch_size": 4,
    "tokens": 64 * 10,
    "progress": False,
    "validation_tokens": 200,
    "lr": 3e-3,
    "n_features": 24,
}


@pytest.fixture
def pair(tiny_model):
    def make(family="llama", dtype=torch.float32):
        base = tiny_model(family, dtype=dtype)
        target = copy.deepcopy(base)
        torch.manual_seed(3)
        for place in anatomy(target).layers:
            for parameter in target.get_submodule(place.mlp).parameters():
                parameter.data += 0.2 * parameter.std() * torch.randn_like(parameter)
        return target, base

    return make


def adapters_for(model) -> AdapterSet:
    torch.manual_seed(4)
    adapters = [TranscoderAdapter(32, 24, dtype=torch.float64) for _ in range(3)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.W_dec, std=0.1)
        torch.nn.init.normal_(adapter.b_enc, std=0.1)
    return AdapterSet(adapters, adapter_sites(model))


def run(model, batch):
    """(residuals at the kept positions, log-probabilities at the predicting ones), all at once, by transformers."""
    parts = anatomy(model)
    stream = []
    places = [*(layer.block for layer in parts.layers), parts.final_norm]
    handles = [
        model.get_submodule(place).register_forward_pre_hook(
            lambda module, args, kwargs: stream.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for place in places
    ]
    logits = model(**batch.model_inputs).logits
    for handle in handles:
        handle.remove()
    return [h[batch.mask] for h in stream], logits[batch.labels != NO_LABEL].log_softmax(-1)


def loss_by_hand(target, base, adapters, batch, objective, k, loss):
    """The optimised loss in one graph, straight from its definition."""
    with torch.no_grad():
        stream, q = run(target, batch)
    labels = batch.labels[batch.labels != NO_LABEL]

    def distance(p):
        if loss == "lm":
            return -p[torch.arange(len(p)), labels].mean()
        return (q.exp() * (q - p)).sum(-1).mean()

    inputs = [[] for _ in adapters]
    handles = [
        adapter.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        for adapter, kept in zip(adapters, inputs, strict=True)
    ]
    with hybrid(target, base, adapters):
        adapted, p = run(target, batch)
    for handle in handles:
        handle.remove()
    total = objective.adapt * distance(p)
    for adapter, kept in zip(adapters, inputs, strict=True):
        f = torch.relu(kept[0] @ adapter.W_enc.T + adapter.b_enc)[batch.mask]
        total = total + objective.l1 * (f * adapter.W_dec.norm(dim=1)).sum(-1).mean()
    errors = [(h - ref).square().sum() / ref.square().sum() for h, ref in zip(adapted, stream, strict=True)]
    total = total + objective.nmse * sum(errors) / len(errors)
    for layers in (range(k), range(k, 3)):
        if layers:
            with hybrid(target, base, adapters, layers=list(layers)):
                total = total + objective.bridge * distance(run(target, batch)[1])
    return total


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("loss", ["kl", "lm"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_gradients_are_those_of_the_sum(pair, data, family, loss, dense):
    target, base = pair(family, torch.float64)
    adapters = adapters_for(target)
    batch = next(iter(data.batches("train", 2)))
    objective = AdapterObjective(adapt=0.7, l1=0.01, nmse=1.3, bridge=1.9, loss=loss)
    with comparison(target, base) as models:
        task = AdapterTask(models, adapters, objective, seed=0)
        task._dense = [dense] * 3
        (k,) = task._cutoffs(5)
        metrics = task.backward((batch, 5))
    found = {
        name: p.grad.clone()
        for a in adapters
        for name, p in zip(map(id, a.parameters()), a.parameters(), strict=True)
    }
    for adapter in adapters:
        adapter.zero_grad()
    target.requires_grad_(False)
    base.requires_grad_(False)
    total = loss_by_hand(target, base, adapters, batch, objective, k, loss)
    total.backward()
    for adapter in adapters:
        for name, p in adapter.named_parameters():
            # The two add up the same terms in another order: their size, not the sum's, bounds the rounding.
            assert_within_budget(found[id(p)], p.grad, p.grad, magnitude=1.0, name=name)
    penalty = objective.l1 * metrics["l1"].sum()
    assert_within_budget(metrics["loss"] + penalty, total.detach(), total.detach())


def test_switching_layers_covers_all_cuts_and_depends_on_seed_and_step_alone(pair):
    with comparison(*pair()) as models:
        tasks = [
            AdapterTask(models, adapters_for(models.target), AdapterObjective(), seed=seed)
            for seed in (1, 1, 2)
        ]
        cuts = [[task._cutoffs(step)[0] for step in range(60)] for task in tasks]
        many = AdapterTask(models, adapters_for(models.target), AdapterObjective(cutoffs=9), seed=0)
        assert sorted(many._cutoffs(0)) == [0, 1, 2, 3]
    assert cuts[0] == cuts[1] != cuts[2]
    assert set(cuts[0]) == {0, 1, 2, 3}


def test_adapters_close_the_gap_and_models_stay(pair, data, tmp_path):
    target, base = pair()
    before = {n: t.clone() for m in (target, base) for n, t in m.state_dict().items()}
    flags = [p.requires_grad for p in target.parameters()]
    adapters, report = train_adapters(
        target, base, data, out=tmp_path / "a", **(OPTIONS | {"tokens": 64 * 150, "l1": 1e-4, "lr": 1e-2})
    )
    assert report.adapted.kl < 0.6 * report.hybrid.kl
    assert 0.4 < report.kl_recovered < 1
    assert report.hybrid.nmse[0] == report.adapted.nmse[0] == 0
    assert report.hybrid.l0 == []
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]) or name in base.state_dict()
    assert [p.requires_grad for p in target.parameters()] == flags
    again = AdapterSet.from_pretrained(tmp_path / "a")
    assert_same_bits(again[1].W_dec, adapters[1].W_dec)
    assert again.metadata["training"]["kl_recovered"] == report.kl_recovered
    assert (tmp_path / "a.run" / "report.json").is_file()


def test_bias_only_has_no_active_feature(pair, data):
    adapters, report = train_adapters(*pair(), data, bias_only=True, **OPTIONS)
    assert report.adapted.l0 == [0, 0, 0]
    assert report.adapted.kl < report.hybrid.kl
    for adapter in adapters:
        assert adapter.n_features == 1
        assert adapter.b_dec.count_nonzero() == 32
        assert adapter.W_dec.count_nonzero() == adapter.W_enc.count_nonzero() == 0


def test_interrupted_and_resumed_ends_with_the_same_bits(pair, data, tmp_path, interrupt, same_tensors):
    target, base = pair()

    def tensors(**options):
        found = train_adapters(target, base, data, **(OPTIONS | {"tokens": 64 * 40} | options))[0]
        return {f"{i}.{n}": t for i, a in enumerate(found) for n, t in a.state_dict().items()}

    whole = tensors()
    for step in (5, 33):  # 32: what is dense is decided anew
        with pytest.raises(Interrupted):
            tensors(out=tmp_path / "a", callbacks=[interrupt(step)], resume="auto")
    same_tensors(tensors(out=tmp_path / "a", resume=True), whole)
    with pytest.raises(Interrupted):
        tensors(out=tmp_path / "a", callbacks=[interrupt(2)])
    target.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="belongs to another configuration: l1 "):
        tensors(out=tmp_path / "a", resume=True, l1=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"l1": -1}, "l1: expected a number >= 0, got -1"),
        ({"l1_ramp": 2}, r"l1_ramp: expected a share of the steps in \[0, 1\], got 2"),
        ({"loss": "mse"}, "loss: expected 'kl' or 'lm', got 'mse'"),
        ({"n_features": 0}, "n_features: expected an int >= 1, got 0"),
        ({"adapt": 0, "nmse": 0, "bridge": 0}, "expected one of them above 0, got none"),
    ],
)
def test_options_are_checked(pair, data, options, match):
    with pytest.raises(ValueError, match=match):
        train_adapters(*pair(), data, **(OPTIONS | options))


def test_models_are_checked(pair, data, tiny_model):
    target, base = pair()
    with pytest.raises(
        ValueError, match="expected a model whose MLPs differ from the target's, got the same MLPs"
    ):
        train_adapters(copy.deepcopy(base), base, data, **OPTIONS)
    with pytest.raises(ValueError, match="base: expected n_layers 3"):
        train_adapters(target, tiny_model("llama", num_hidden_layers=2), data, **OPTIONS)
    with pytest.raises(TypeError, match="train_adapters: unknown option 'k'"):
        train_adapters(target, base, data, k=3)


def test_several_processes_are_refused(pair, data, monkeypatch):
    """Before anything is measured or written: each would do all the work."""

    def two(*arguments):
        run = Run(*arguments)
        run.processes = Processes()
        run.processes.size = 2
        return run

    monkeypatch.setattr("fasttc.training.adapter.Run", two)
    with pytest.raises(ValueError, match="train_adapters: expected one process, got 2"):
        train_adapters(*pair(), data, **OPTIONS)


@pytest.mark.parametrize(
    ("adapted", "hybrid", "share"), [(0.5, 2.0, 0.75), (2.0, 2.0, 0.0), (3.0, 2.0, -0.5)]
)
def test_share_of_the_kl_that_is_taken_away(adapted, hybrid, share):
    qualities = [AdapterQuality(kl, 0.0, [], [], [], 1, 1) for kl in (adapted, hybrid)]
    assert qualities[0].kl_recovered(qualities[1]) == share


def test_no_share_of_a_kl_that_is_zero():
    quality = AdapterQuality(0.0, 0.0, [], [], [], 1, 1)
    assert math.isnan(quality.kl_recovered(quality))
