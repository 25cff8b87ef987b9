"""Interventions: against hooks made by hand, against edges, in generate(), and that the model is left as it was."""

import pytest
import torch

import fasttc
from fasttc.attribution import Intervention, intervene, intervened, negated
from fasttc.models import anatomy, bind_sites, capture, float64_exact
from fasttc.models.linear import unembedding

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def is_untouched(model):
    return not any(
        "forward" in vars(m) or len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )


def active(tcs, model, ids, layer, position):
    """Indices of the active features of a layer at a position, in the model as it is."""
    with capture(model, tcs.sites) as seen, torch.no_grad():
        model(ids[None])
    return tcs[layer].encode(seen.x[layer][0]).to_dense()[position].nonzero()[:, 0].tolist()


def by_hand(model, tcs, ids, layer, change):
    """Logits with ``change(dense activations [T, F])`` written into one layer by plain hooks."""
    site, transcoder = bind_sites(model, tcs.sites)[layer], tcs[layer]
    seen = {}

    def write(module, args, output):
        old = transcoder.encode(seen["x"]).to_dense()
        return output + (change(old.clone()) - old) @ transcoder.W_dec

    with capture(model, [site]) as record:

        def read(*_):
            seen["x"] = record.x[0]

        handles = [
            model.get_submodule(site.write).register_forward_pre_hook(read),
            model.get_submodule(site.write).register_forward_hook(write),
        ]
        found = logits(model, ids)
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_every_action_against_hooks(family, skip, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, "jumprelu" if skip else "topk", skip=skip)
    ids = torch.stack([prompt_ids, prompt_ids.flip(0)])  # a batch: positions are the same in each row
    with float64_exact(model):
        on = active(tcs, model, prompt_ids, 1, 4)
        off = next(index for index in range(40) if index not in on)
        before = logits(model, ids)
        cases = [
            ([Intervention(1, on[0], 4)], lambda a: a.index_put((torch.tensor([0, 1]), *at(4, on[0])), zero)),
            (
                [Intervention(1, [on[0], off], [2, -5], "set", 1.5)],
                lambda a: fill(a, [2, 4], [on[0], off], 1.5),
            ),
            ([Intervention(1, off, slice(3, -1), "add", 0.7)], lambda a: plus(a, slice(3, 8), off, 0.7)),
            ([Intervention(1, None, None, "scale", -1.0)], lambda a: times(a, slice(1, None), -1.0)),
            (
                [
                    Intervention(1, off, 4, "set", 2.0),
                    Intervention(1, None, 4, "scale", 0.5),
                ],  # in this order
                lambda a: times(fill(a, [4], [off], 2.0), slice(4, 5), 0.5),
            ),
        ]
        zero = torch.zeros(2, dtype=torch.float64)
        for interventions, change in cases:
            with intervened(model, tcs, interventions):
                found = logits(model, ids)
            expected = by_hand(model, tcs, ids, 1, change)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            assert float((found - before).abs().max()) > 1e-4
        assert torch.equal(logits(model, ids), before)
    assert is_untouched(model)


def at(position, index):
    return torch.full((2,), position), torch.full((2,), index)


def fill(acts, positions, indices, value):
    for position in positions:
        acts[:, position, indices] = value
    return acts


def plus(acts, positions, index, value):
    acts[:, positions, index] += value
    return acts


def times(acts, positions, value):
    acts[:, positions] *= value
    return acts


FROZEN = {"freeze_attention": True, "freeze_norms": True}


@pytest.mark.parametrize("options", [{}, FROZEN | {"constrained_layers": [0, 1, 2]}], ids=["live", "frozen"])
def test_what_changes_no_activation_changes_no_bit(family, options, tiny_model, random_set, prompt_ids):
    model = tiny_model(family)
    tcs = random_set(model, "relu", skip=True)
    before = logits(model, prompt_ids[None])
    text = model.generate(prompt_ids[None], **GREEDY)
    off = next(i for i in range(40) if i not in active(tcs, model, prompt_ids, 1, 4))
    for nothing in ([], [Intervention(1, off, 4)], [Intervention(0, None, action="scale", value=1.0)]):
        with intervened(model, tcs, nothing, **options):
            assert torch.equal(logits(model, prompt_ids[None]), before)
            assert torch.equal(model.generate(prompt_ids[None], **GREEDY), text)


@pytest.mark.parametrize("skip", [False, True], ids=["topk", "jumprelu-skip"])
def test_frozen_and_constrained_changes_are_edges(family, skip, tiny_model, random_set, prompt_ids):
    """Change = edge times relative change, exactly: of pre-activations of every layer and of the logits."""
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model, "jumprelu" if skip else "topk", skip=skip, n_features=24)
    with float64_exact(model):
        graph = fasttc.attribute(model, tcs, prompt_ids)
        rows = unembedding(model)
        directions = rows.weight[graph.logit_ids] - rows.mean
        final = model.get_submodule(anatomy(model).final_norm)

        def measured():
            kept = []
            handle = final.register_forward_hook(lambda module, args, output: kept.append(output[0, -1]))
            with capture(model, tcs.sites) as seen:
                logits(model, prompt_ids[None])
            handle.remove()
            reads = [
                seen.x[layer][0, position] @ tcs[layer].W_enc[i] for layer, position, i in graph.features
            ]
            return torch.cat([torch.stack(reads), directions @ kept[-1]])

        before = measured()
        dense = graph.dense()
        edges = torch.cat([dense[: graph.n_features], dense[graph.logit_slice]])
        chosen = torch.arange(graph.n_features)[graph.features[:, 0] < 2][::9].tolist()
        assert len(chosen) > 4
        for number, column in enumerate(chosen):
            layer, position, index = graph.features[column].tolist()
            relative = -1.0 if number % 2 else 0.6
            change = Intervention(layer, index, position, "scale", 1 + relative)
            with intervened(model, tcs, [change], **FROZEN, constrained_layers=range(3)):
                moved = measured() - before
            torch.testing.assert_close(moved, relative * edges[:, column], rtol=0, atol=1e-10)


def test_constrained_range_clamps_inside_and_lets_go_above(family, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model)
    with float64_exact(model), torch.no_grad():
        with capture(model, tcs.sites) as seen:
            model(prompt_ids[None])
        original = [y.clone() for y in seen.y]
        change = Intervention(0, active(tcs, model, prompt_ids, 0, 3), 3, "scale", 3.0)
        with intervened(model, tcs, [change], constrained_layers=[1]), capture(model, tcs.sites) as seen:
            model(prompt_ids[None])
        assert torch.equal(seen.y[1], original[1])
        assert not torch.equal(seen.y[0], original[0])
        assert not torch.equal(seen.x[1], seen.x[0])
        # Layer 2 answers to what it reads now: its MLP, run on it by hand, gives what it put out.
        writer = model.get_submodule(bind_sites(model, tcs.sites)[2].write)
        kept = []
        handle = writer.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
        with intervened(model, tcs, [change], constrained_layers=[1]):
            model(prompt_ids[None])
        handle.remove()
        torch.testing.assert_close(kept[-1][1], writer.forward(kept[-1][0]), rtol=0, atol=1e-12)
        assert not torch.allclose(kept[-1][1], original[2], atol=1e-6)


@pytest.mark.parametrize("options", [{}, FROZEN | {"constrained_layers": [0, 1]}], ids=["live", "frozen"])
def test_generate_with_a_cache_equals_full_recomputation(family, options, tiny_model, random_set, prompt_ids):
    model = tiny_model(family, dtype=torch.float64)
    tcs = random_set(model)
    for change in (Intervention(1, None, slice(4, None), "scale", -2.0), Intervention(0, 7, 10, "set", 9.0)):
        with float64_exact(model), torch.no_grad():
            plain = model.generate(prompt_ids[None], **GREEDY)
            with intervened(model, tcs, [change], **options):
                scored = model.generate(
                    prompt_ids[None], **GREEDY, output_logits=True, return_dict_in_generate=True
                )
                whole = logits(model, scored.sequences[:, :-1])  # one forward over all tokens: no cache
        torch.testing.assert_close(  # generate() rounds the logits it returns to float32
            torch.stack(scored.logits, 1), whole[:, len(prompt_ids) - 1 :].float(), rtol=1e-6, atol=1e-6
        )
        plain_logits = logits(model, scored.sequences[:, :-1])
        moved = (whole - plain_logits).abs().amax(-1)[0]
        first = 4 if change.features is None else 10
        assert (
            float(moved[:first].max()) < 1e-4
        )  # nothing before the first change; the plain one is not exact
        assert float(moved[first:].max()) > 1e-3
        assert plain.shape[1] == scored.sequences.shape[1]


def test_restored_after_exceptions(tiny_model, random_set, prompt_ids):
    model = tiny_model("gemma2")
    tcs = random_set(model)
    before = logits(model, prompt_ids[None])
    context = intervened(model, tcs, [Intervention(1, 3)], **FROZEN, constrained_layers=[0, 2])
    with pytest.raises(IndexError), context:
        model(prompt_ids[None] + 100)
    assert is_untouched(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, prompt_ids[None]), before)


def test_inside_peft(tiny_model, random_set, prompt_ids):
    peft = pytest.importorskip("peft")
    plain = tiny_model("gemma3", dtype=torch.float64)
    tcs = random_set(plain)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config).eval()
    change = Intervention(1, None, action="scale", value=0.0)
    before = logits(model, prompt_ids[None])
    effect = intervene(model, tcs, prompt_ids, change, **FROZEN, max_new_tokens=3)
    assert torch.equal(effect.logits_before, before[0])
    merged = model.merge_and_unload()
    again = intervene(merged, tcs, prompt_ids, change, **FROZEN, max_new_tokens=3)
    torch.testing.assert_close(effect.logits_after, again.logits_after, rtol=0, atol=1e-5)
    assert torch.equal(effect.generated_after, again.generated_after)
    assert float((effect.logits_after - effect.logits_before).abs().max()) > 1e-3


def test_effect_names_what_changed(tiny_model, random_set, tiny_tokenizer):
    model = tiny_model("llama")
    tcs = random_set(model)
    ids = torch.tensor([2, 17, 9, 33])
    on = active(tcs, model, ids, 0, 2)
    change = Intervention(0, on, 2)
    effect = intervene(
        model, tcs, "t17 t9 t33", change, tokenizer=tiny_tokenizer, activations=True, max_new_tokens=4
    )
    assert effect.input_ids.tolist() == ids.tolist()
    before, after = (torch.softmax(x[-1].double(), 0) for x in (effect.logits_before, effect.logits_after))
    top = effect.token_changes(3)
    assert [change.token for change in top] == (after - before).abs().topk(3).indices.tolist()
    assert top[0].prob_after - top[0].prob_before == pytest.approx(float((after - before)[top[0].token]))
    assert top[0].logit_after == float(effect.logits_after[-1, top[0].token])
    assert effect.kl() == pytest.approx(float((before * (before / after).log()).sum()))
    assert effect.kl(0) == 0  # before the change, nothing moved
    dense = [
        [acts.to_dense() for acts in run] for run in (effect.activations_before, effect.activations_after)
    ]
    largest = effect.feature_changes(1)[0]
    differences = torch.stack([b - a for a, b in zip(*dense, strict=True)])
    assert abs(largest.after - largest.before) == pytest.approx(float(differences.abs().max()))
    assert (largest.layer, largest.position) > (0, 1)
    assert dense[0][largest.layer][largest.position, largest.feature] == largest.before
    assert dense[1][largest.layer][largest.position, largest.feature] == largest.after
    assert torch.equal(
        effect.generated_before, model.generate(ids[None], do_sample=False, max_new_tokens=4)[0, 4:]
    )
    with pytest.raises(ValueError, match="activations=True"):
        intervene(model, tcs, ids, change).feature_changes()


def test_negated_decoders(tiny_model, random_set, prompt_ids):
    """Steering takes away what the features write, bias and error excepted."""
    model = tiny_model("gemma2", dtype=torch.float64)
    tcs = random_set(model, "relu")
    with float64_exact(model), torch.no_grad():
        found = intervene(model, tcs, prompt_ids, negated(tcs, 0.4)).logits_after

        def less(x, y, transcoder):
            written = transcoder(x) - transcoder.b_dec
            written[:, :1] = 0
            return y - 0.4 * written

        functions = [lambda x, y, tc=tc: less(x, y, tc) for tc in tcs]
        with fasttc.models.overridden(model, tcs.sites, functions):
            expected = logits(model, prompt_ids[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bad_input(tiny_model, random_set, prompt_ids):
    model = tiny_model("gpt2")
    tcs = random_set(model)

    def refused(match, *changes, **options):
        with pytest.raises(ValueError, match=match):
            intervene(model, tcs, prompt_ids, changes, **options)
        assert is_untouched(model)

    refused(r"layer: expected a layer of the transcoders \[0, 1, 2\], got 3", Intervention(3, 0))
    refused(r"features: expected indices in \[0, 40\), got 40", Intervention(1, [2, 40]))
    refused(r"positions: expected numbers in \[-9, 9\), got 9", Intervention(1, 2, 9))
    refused(
        r"positions: expected numbers in \[-9, 12\), got -10", Intervention(1, 2, [-10]), max_new_tokens=3
    )
    refused("expected named features for set 1.0, got all of layer 1", Intervention(1, None, value=1.0))
    refused(r"constrained_layers: expected numbers in \[0, 3\), got 5", constrained_layers=[5])
    refused(r"context\) with those generated, got 9 \+ 90", Intervention(1, 2), max_new_tokens=90)
    with pytest.raises(ValueError, match="input width 32"):
        intervene(model, random_set(tiny_model("gpt2", n_embd=64)), prompt_ids, Intervention(1, 2))
