"""Adapters in a graph: against autograd through the hybrid under RelP's rules, conservation, and true errors."""

import pytest
import torch

import fasttc
from fasttc import Site, Transcoder, TranscoderSet
from fasttc.attribution import Feature
from fasttc.models import adapter_sites, anatomy, capture, float64_exact, hybrid
from fasttc.models.linear import unembedding
from fasttc.nn import AdapterSet, TranscoderAdapter


@pytest.fixture
def pair(tiny_model):
    """`pair(family)`: a target, its base (other MLPs) and adapters that write as much as an MLP, in float64."""

    def make(family):
        target, base = (
            tiny_model(family, dtype=torch.float64),
            tiny_model(family, seed=1, dtype=torch.float64),
        )
        adapters = []
        for _ in range(3):
            adapter = TranscoderAdapter(32, 12, dtype=torch.float64)
            with torch.no_grad():
                adapter.W_dec.normal_(std=0.1)
                adapter.b_dec.normal_(std=0.1)
                adapter.b_enc.normal_(std=0.1)
            adapters.append(adapter)
        return target, base, AdapterSet(adapters, adapter_sites(target))

    return make


class RelpOracle:
    """The hybrid as autograd sees it when norms, attention and MLPs follow the rules of RelP.

    Built on ``FrozenOracle``: what it calls an MLP's output is what the adapter adds, and the writing hook adds the
    dense MLP, linear at its values on the prompt.
    """

    def __init__(self, oracle, target, base, adapters, ids):
        with hybrid(target, base, adapters):
            self.frozen = oracle(target, adapters, ids)
        self.parts, self.adapters = anatomy(target), adapters
        self.mlps = [base.get_submodule(layer.mlp) for layer in self.parts.layers]
        self.frozen._writer = self._writer  # what the hooks write into the stream
        self.count = 0

    def dense(self, number, x):
        """The MLP's output as a linear function of x, with the value it has on the prompt."""
        mlp, at = self.mlps[number], self.frozen.x[number]
        if hasattr(mlp, "gate_proj"):
            gate, up = mlp.gate_proj(at).detach(), mlp.up_proj(at).detach()
            share = mlp.act_fn(gate) / gate
            hidden = 0.5 * mlp.gate_proj(x) * share * up + 0.5 * mlp.act_fn(gate) * mlp.up_proj(x)
            return mlp.down_proj(hidden)
        enter, leave = (
            (mlp.c_fc, mlp.c_proj) if hasattr(mlp, "c_fc") else (mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        )
        before = enter(at).detach()
        return leave(enter(x) * (mlp.act(before) / before))

    def _writer(self, skip, value, x):
        def hook(*_):
            return (value + self.dense(len(x) - 1, x[-1]))[None]

        return hook

    def added(self):
        """Per layer, what the adapter adds."""
        return [adapter(x).detach() for adapter, x in zip(self.adapters, self.frozen.x, strict=True)]

    def measured(self, graph, rows, entry, written):
        x, final = self.frozen.run(entry, written)
        reads = [x[a][p] @ self.adapters[a].W_enc[i] for a, p, i in graph.features.tolist()]
        directions = rows.weight[graph.logit_ids] - rows.mean
        return torch.cat([torch.stack(reads), directions @ final[-1]])


def test_relp_edges_against_autograd_and_conservation(family, pair, oracle, prompt_ids):
    target, base, adapters = pair(family)
    with float64_exact(target), float64_exact(base):
        graph = fasttc.attribute(target, None, prompt_ids, adapters=adapters, base=base)
        relp = RelpOracle(oracle, target, base, adapters, prompt_ids)
        rows = unembedding(target)
        frozen, added = relp.frozen, relp.added()
        entry = frozen.entry.clone().requires_grad_()
        written = [value.clone().requires_grad_() for value in added]
        targets = relp.measured(graph, rows, entry, written)
        with hybrid(target, base, adapters), torch.no_grad():
            logits = target(prompt_ids[None]).logits[0, -1]
        assert graph.logit_ids[0] == logits.argmax()
        cotangents = torch.eye(len(targets), dtype=torch.float64)
        at_entry, *at_written = torch.autograd.grad(
            targets, [entry, *written], cotangents, is_grads_batched=True, allow_unused=True
        )
        dense = graph.dense()
        edges = torch.cat([dense[: graph.n_features], dense[graph.logit_slice]])
        for column, (layer, position, index) in enumerate(graph.features.tolist()):
            grads = at_written[layer]
            write = graph.activations[column] * adapters[layer].W_dec[index]
            expected = torch.zeros(len(targets)).double() if grads is None else grads[:, position] @ write
            torch.testing.assert_close(edges[:, column], expected.detach(), rtol=0, atol=1e-10)
        tokens = (at_entry * frozen.tokens).sum(-1)
        torch.testing.assert_close(edges[:, graph.token_slice], tokens.detach(), rtol=0, atol=1e-10)
        assert float(edges[:, graph.error_slice].abs().max()) == 0
        # Conservation: without any source, what remains are biases; the edges are the rest.
        silent = [
            adapter.b_dec.expand_as(value).clone() for adapter, value in zip(adapters, added, strict=True)
        ]
        for value, full in zip(silent, added, strict=True):
            value[:1] = full[:1]  # features at the zeroed position are no nodes
        with torch.no_grad():
            bias = relp.measured(graph, rows, frozen.entry - frozen.tokens, silent)
        torch.testing.assert_close(edges.sum(1) + bias, targets.detach(), rtol=0, atol=1e-10)
    assert bool(graph.from_adapter.all())
    assert graph.metadata["mlp"] == "relp"


@pytest.mark.parametrize("x", ["mlp_in", "normalized"])
@pytest.mark.parametrize("y", ["mlp_out", "mlp_out_post"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "llama"])
def test_joined_with_transcoders(family, x, y, pair, random_set, oracle, prompt_ids):
    """Adapter edges pass the post-norm at its scale; errors are true; everything adds up."""
    target, base, adapters = pair(family)
    tcs = random_set(target, "relu", x=x, y=y, n_features=20)
    with float64_exact(target), float64_exact(base):
        graph = fasttc.attribute(target, tcs, prompt_ids, adapters=adapters, base=base)
        with hybrid(target, base, adapters):
            frozen = oracle(target, tcs, prompt_ids)
            with capture(target, adapters.sites) as seen, torch.no_grad():
                target(prompt_ids[None])
            reads = [value[0] for value in seen.x]
        # By hand: what each feature writes at the transcoders' own place, and what is left over.
        posts = []
        for layer in frozen.parts.layers:
            post = layer.mlp_post_norm if y == "mlp_out_post" else None
            norm = None if post is None else target.get_submodule(post)
            posts.append((1.0, 1.0) if norm is None else (frozen.scales[norm][0], 1 + norm.weight))
        entry = frozen.entry.clone().requires_grad_()
        written = [value.clone().requires_grad_() for value in frozen.constants()]
        own_x, final = frozen.run(entry, written)
        rows = unembedding(target)
        targets = []
        for layer, position, index in graph.features.tolist():
            if index < 20:
                targets.append(own_x[layer][position] @ tcs[layer].W_enc[index])
            else:
                norm = target.get_submodule(frozen.parts.layers[layer].mlp_norm)
                gain = norm.weight + frozen.parts.gain_offset if x == "normalized" else 1.0
                targets.append((own_x[layer][position] * gain) @ adapters[layer].W_enc[index - 20])
        directions = rows.weight[graph.logit_ids] - rows.mean
        targets = torch.cat([torch.stack(targets), directions @ final[-1]])
        at_written = torch.autograd.grad(
            targets,
            written,
            torch.eye(len(targets)).double(),
            is_grads_batched=True,
            allow_unused=True,
        )
        dense = graph.dense()
        edges = torch.cat([dense[: graph.n_features], dense[graph.logit_slice]])
        at_written = [
            torch.zeros(len(targets), *entry.shape).double() if g is None else g for g in at_written
        ]
        for column, (layer, position, index) in enumerate(graph.features.tolist()):
            scale, gain = posts[layer]
            if index < 20:
                write = tcs[layer].W_dec[index]
            else:
                scale = scale if isinstance(scale, float) else scale[position]
                write = adapters[layer].W_dec[index - 20] * gain * scale
            expected = at_written[layer][:, position] @ (graph.activations[column] * write)
            torch.testing.assert_close(edges[:, column], expected.detach(), rtol=0, atol=1e-10)
        errors = []
        for layer in range(3):
            scale, gain = posts[layer]
            error = (
                frozen.y[layer] - tcs[layer](frozen.x[layer]) - adapters[layer](reads[layer]) * gain * scale
            )
            error[:1] = 0
            errors.append((at_written[layer] * error).sum(-1))
        torch.testing.assert_close(
            edges[:, graph.error_slice], torch.cat(errors, 1).detach(), rtol=0, atol=1e-10
        )
        owned = graph.from_adapter
        assert 0 < int(owned.sum()) < graph.n_features
        assert torch.equal(owned, graph.features[:, 2] >= 20)


def test_a_feature_of_either_owner_as_target(pair, random_set, prompt_ids):
    target, base, adapters = pair("gemma2")
    tcs = random_set(target, "relu", n_features=20)
    with float64_exact(target), float64_exact(base):
        graph = fasttc.attribute(target, tcs, prompt_ids, adapters=adapters, base=base)
        for owner in (False, True):
            node = int(((graph.features[:, 0] == 2) & (graph.from_adapter == owner)).nonzero()[0])
            chosen = [Feature(*graph.features[node].tolist())]
            row = fasttc.attribute(target, tcs, prompt_ids, adapters=adapters, base=base, targets=chosen)
            one = row.dense()[row.logit_slice][0]
            expected = graph.dense()[node]
            assert float(one[row.token_slice].abs().max()) > 1e-6
            torch.testing.assert_close(one[row.token_slice], expected[graph.token_slice], rtol=0, atol=1e-12)
            torch.testing.assert_close(one[row.error_slice], expected[graph.error_slice], rtol=0, atol=1e-12)


def test_adapters_of_some_layers_beside_the_model_itself(pair, random_set, prompt_ids):
    """Without a base the model runs as it is, and what the adapters claim is held against it."""
    target, _, adapters = pair("llama")
    tcs = random_set(target, n_features=20)
    one = AdapterSet([adapters[1]], [adapters.sites[1]])
    graph = fasttc.attribute(target, tcs, prompt_ids, adapters=one)
    plain = fasttc.attribute(target, tcs, prompt_ids)
    assert set(graph.features[graph.from_adapter][:, 0].tolist()) == {1}
    assert torch.equal(graph.features[~graph.from_adapter], plain.features)
    assert torch.equal(graph.logit_probs, plain.logit_probs)
    assert not bool(plain.from_adapter.any())


def test_bad_input(pair, random_set, prompt_ids):
    target, base, adapters = pair("llama")
    tcs = random_set(target)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            fasttc.attribute(target, *arguments, prompt_ids, **options)

    refused(TypeError, "got an AdapterSet; pass it as adapters=", adapters)
    refused(TypeError, "adapters: expected an AdapterSet, got TranscoderSet", tcs, adapters=tcs)
    refused(ValueError, "base: expected adapters with it", tcs, base=base)
    refused(ValueError, "tcs: expected transcoders, adapters or both, got neither", None)
    refused(ValueError, "base: expected the model whose MLPs run beside adapters", None, adapters=adapters)
    some = AdapterSet([adapters[1]], [adapters.sites[1]])
    refused(ValueError, "expected layers 0 to 2 of the model", None, adapters=some, base=base)
    resid = TranscoderSet(
        [Transcoder(32, 8, k=2).double() for _ in range(3)], [Site(i, "resid_mid") for i in range(3)]
    )
    refused(ValueError, "got resid_mid at layer 0", resid, adapters=adapters)
