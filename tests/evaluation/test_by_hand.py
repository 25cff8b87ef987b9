"""evaluate against an oracle of its own: one document at a time, plain hooks, dense formulas, float64."""

import json
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import fasttc
from fasttc.models import float64_exact, load
from fasttc.nn import TranscoderSet

WHOLE = {"fractions": (0.0, 0.0, 1.0), "tokens": None}
PARTS = {  # family -> layers, norm before the MLP, MLP, module whose output is y
    "llama": ("model.layers", "post_attention_layernorm", "mlp", "mlp"),
    "gemma2": ("model.layers", "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "gemma3": ("model.layers", "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h", "ln_2", "mlp", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "post_attention_layernorm", "mlp", "mlp"),
}


class ByHand:
    """The model with plain hooks: records (x, y) per layer, and swaps y from position ``first`` on."""

    def __init__(self, model: nn.Module, family: str, tcs: TranscoderSet, first: int = 1) -> None:
        self.model, self.family, self.tcs, self.first = model, family, tcs, first
        self.x: list[Tensor] = [torch.empty(0)] * len(tcs)
        self.y: list[Tensor] = [torch.empty(0)] * len(tcs)

    def acts(self, index: int, x: Tensor) -> Tensor:
        tc = self.tcs[index]
        z = x @ tc.W_enc.T + tc.b_enc
        return z.relu() * torch.zeros_like(z).scatter(-1, z.topk(tc.k).indices, 1.0)

    def dense(self, index: int, x: Tensor) -> Tensor:
        tc = self.tcs[index]
        return self.acts(index, x) @ tc.W_dec + tc.b_dec + x @ tc.W_skip.T

    def log_p(self, ids: list[int], modes: dict[int, str]) -> Tensor:
        """[T, V]."""
        path, norm, mlp, writer = PARTS[self.family]
        gain_free = self.family == "gemma2"
        with ExitStack() as stack:
            for index, layer in enumerate(self.model.get_submodule(path)):
                reader = layer.get_submodule(norm if gain_free else mlp)
                read = reader.register_forward_pre_hook(self._read(index, gain_free))
                write = layer.get_submodule(writer).register_forward_hook(
                    self._write(index, modes.get(index))
                )
                stack.callback(read.remove)
                stack.callback(write.remove)
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def _read(self, index: int, normalise: bool):
        def hook(module, args):
            x = args[0][0]
            eps = self.model.config.rms_norm_eps if normalise else 0
            self.x[index] = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() if normalise else x

        return hook

    def _write(self, index: int, mode: str | None):
        def hook(module, args, output):
            if mode is None:
                self.y[index] = output[0]
                return output
            output = output.clone()
            instead = self.dense(index, self.x[index]) if mode == "replaced" else torch.zeros_like(output[0])
            output[0, self.first :] = instead[self.first :]
            return output

        return hook


@torch.no_grad()
def expected(hand: ByHand, docs: list[list[int]]) -> dict:
    """All metrics by their definitions, from log-probabilities and activations of single documents."""
    layers = range(len(hand.tcs))
    variants: dict[str, dict[int, str]] = {}
    for mode in ("replaced", "ablated"):
        variants[mode] = dict.fromkeys(layers, mode)
        variants |= {f"{mode} {layer}": {layer: mode} for layer in layers}
    variants["original"] = {}  # last, so that the recorded x and y are the original's
    nll: dict[str, list[Tensor]] = {name: [] for name in variants}
    kl, wrong = [], []
    xs, ys = ([[] for _ in layers] for _ in range(2))
    for doc in docs:
        ids = [hand.model.config.bos_token_id, *doc]
        log_p = {name: hand.log_p(ids, modes) for name, modes in variants.items()}
        at = torch.arange(hand.first, len(ids) - 1)
        for name, table in log_p.items():
            nll[name].append(-table[at, torch.tensor(ids)[at + 1]])
        p, q = log_p["replaced"][at], log_p["original"][at]
        kl.append((q.exp() * (q - p)).sum(-1))
        wrong.append(p.argmax(-1) != q.argmax(-1))
        for layer in layers:
            xs[layer].append(hand.x[layer][hand.first :])
            ys[layer].append(hand.y[layer][hand.first :])
    result = {name: float(torch.cat(parts).mean()) for name, parts in nll.items()}
    result |= {"kl": float(torch.cat(kl).mean()), "top1": float(torch.cat(wrong).double().mean())}
    result |= {"tokens": sum(map(len, xs[0])), "predictions": sum(map(len, kl)), "layers": []}
    for layer in layers:
        x, y = torch.cat(xs[layer]), torch.cat(ys[layer])
        error = (hand.dense(layer, x) - y).square().sum()
        variance = y.square().sum() - len(y) * y.mean(0).square().sum()
        on = (hand.acts(layer, x) != 0).double()
        numbers = {"fvu": error / variance, "mse": error / len(y), "l0": on.sum(1).mean()}
        result["layers"].append({name: float(n) for name, n in numbers.items()} | {"rates": on.mean(0)})
    return result


def check(report: fasttc.evaluation.Report, truth: dict, rel: float = 1e-9) -> None:
    close = {"rel": rel, "abs": 1e-12}
    ratio = {"rel": 1e3 * rel}
    assert (report.tokens, report.predictions) == (truth["tokens"], truth["predictions"])
    for name in ("original", "replaced", "ablated"):
        assert getattr(report, f"ce_{name}") == pytest.approx(truth[name], **close)
    assert report.kl == pytest.approx(truth["kl"], **close)
    assert report.top1_error == pytest.approx(truth["top1"], **close)
    assert 0 < report.top1_error < 1
    cost = truth["ablated"] - truth["original"]
    assert report.recovered == pytest.approx((truth["ablated"] - truth["replaced"]) / cost, **ratio)
    for index, (layer, of_layer) in enumerate(zip(report.layers, truth["layers"], strict=True)):
        assert layer.layer == index
        for name in ("fvu", "mse", "l0"):
            assert getattr(layer, name) == pytest.approx(of_layer[name], **close)
        rates = of_layer["rates"]
        assert (layer.dead, layer.dense) == (int((rates == 0).sum()), int((rates > 0.1).sum()))
        torch.testing.assert_close(report.features[index].firing_rate, rates, rtol=1e-12, atol=0)
        replaced, ablated = truth[f"replaced {index}"], truth[f"ablated {index}"]
        assert layer.ce_replaced == pytest.approx(replaced, **close)
        assert layer.ce_ablated == pytest.approx(ablated, **close)
        assert layer.recovered == pytest.approx((ablated - replaced) / (ablated - truth["original"]), **ratio)
    for name in ("fvu", "l0"):
        mean = sum(getattr(layer, name) for layer in report.layers) / len(report.layers)
        assert getattr(report, name) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("family", sorted(PARTS))
def test_every_number(tiny_model, transcoders, documents, family):
    model = tiny_model(family, dtype=torch.float64)
    tcs = transcoders(model)
    with float64_exact(model):
        truth = expected(ByHand(model, family, tcs), documents)
        report = fasttc.evaluate(model, tcs, documents, batch_size=3, context=24, **WHOLE)
    check(report, truth)


def test_further_zeroed_positions_are_left_out(tiny_model, transcoders, documents):
    model = tiny_model("llama", dtype=torch.float64)
    tcs = transcoders(model, zero_positions=4)
    with float64_exact(model):
        truth = expected(ByHand(model, "llama", tcs, first=4), [doc for doc in documents if len(doc) > 3])
        report = fasttc.evaluate(model, tcs, documents, context=24, **WHOLE)
    check(report, truth)


def test_a_trained_model_on_real_text(shared_data, transcoders):
    """Through a tokenizer; long documents are cut, and each piece starts with BOS."""
    model, tokenizer = load(shared_data / "models" / "stories260K", dtype=torch.float64)
    records = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text())
    texts = [record["QUESTION"] for record in list(records.values())[:8]]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pieces = [doc[start : start + 47] for doc in ids for start in range(0, len(doc), 47)]
    assert len(pieces) > len(texts)
    tcs = transcoders(model)
    with float64_exact(model):
        truth = expected(ByHand(model, "llama", tcs), pieces)
        report = fasttc.evaluate(model, tcs, texts, tokenizer=tokenizer, context=48, **WHOLE)
    check(report, truth)
    assert 3.5 < report.ce_original < 6  # nats per token, on text this model has never seen
