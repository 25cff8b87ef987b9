"""The disease swap: on a model that knows nothing, and (slowly) on one that was trained to know."""

import pytest
import torch

from fasttc.evaluation.causal import accuracy, disease_swap
from fasttc.models.build import build_causal_lm
from fasttc.training import finetune
from fasttc.worlds import CLINICAL_MODEL, ClinicalWorld


@pytest.fixture(scope="module")
def world() -> ClinicalWorld:
    return ClinicalWorld()


def test_a_random_model_fails_the_check(world: ClinicalWorld) -> None:
    model, _ = build_causal_lm(CLINICAL_MODEL, world.vocabulary)
    report = disease_swap(model, world, n=40)
    assert (report.layer, report.n) == (1, 40)
    assert report.two_hop_accuracy < 0.2
    assert report.two_hop_follows < 0.5
    assert not report.passed
    assert report.to_dict()["passed"] is False


def test_the_shift_reaches_the_answer_and_the_hooks_are_removed(world: ClinicalWorld) -> None:
    model, _ = build_causal_lm(CLINICAL_MODEL, world.vocabulary)
    prompts = world.prompts("two_hop", 8)
    ids = torch.tensor([world.encode(prompt.text) for prompt in prompts])
    before = model(ids).logits
    one, other = (disease_swap(model, world, n=30, layer=layer) for layer in (1, 3))
    assert (one.layer, other.layer) == (1, 3)
    assert one.two_hop_accuracy == other.two_hop_accuracy
    assert torch.equal(before, model(ids).logits)


def test_accuracy_counts_the_most_probable_word(world: ClinicalWorld) -> None:
    model, _ = build_causal_lm(CLINICAL_MODEL, world.vocabulary)
    drug = world.vocabulary.index(world.marker_drugs[3])
    with torch.no_grad():  # tied embeddings: a long row along the last hidden state wins every argmax
        prompts = world.prompts("pattern", 50)
        ids = torch.tensor([world.encode(prompt.text) for prompt in prompts])
        hidden = model.model(ids).last_hidden_state[:, -1].mean(0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[drug] = hidden
    expected = sum(prompt.answer == world.marker_drugs[3] for prompt in prompts) / 50
    assert 0 < expected < 1
    assert accuracy(model, world, prompts) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_trained_model_passes_the_check(seed: int) -> None:
    world = ClinicalWorld(seed)
    model, tokenizer = build_causal_lm(CLINICAL_MODEL, world.vocabulary, seed=seed)
    options = {"parameters": "all", "inplace": True, "progress": False, "seed": seed}
    documents = world.base_corpus(CLINICAL_MODEL["documents"])
    finetune(
        model,
        documents,
        tokenizer,
        context=CLINICAL_MODEL["context"],
        **options,
        **CLINICAL_MODEL["training"],
    )
    report = disease_swap(model, world)
    assert report.two_hop_accuracy >= 0.95
    assert report.pattern_accuracy >= 0.98
    assert report.passed, report
