"""The clinical world keeps its promises: deterministic, hidden diseases, held-out pairs, partners one step away."""

import itertools

import pytest

from fasttc.worlds import ClinicalWorld


@pytest.fixture(scope="module")
def world() -> ClinicalWorld:
    return ClinicalWorld(seed=3)


@pytest.fixture(scope="module")
def corpora(world: ClinicalWorld) -> dict[str, list[str]]:
    return {"base": world.base_corpus(6000), "finetuned": world.finetune_corpus(6000)}


def test_everything_is_a_function_of_the_seed() -> None:
    one, same, other = ClinicalWorld(1), ClinicalWorld(1), ClinicalWorld(2)
    assert one.base_corpus(50) == same.base_corpus(50)
    assert one.prompts("two_hop", 20) == same.prompts("two_hop", 20)
    assert one.base_corpus(50) != one.base_corpus(50, seed=1)
    assert one.findings != other.findings


def test_names_are_distinct_and_the_vocabulary_is_closed(world: ClinicalWorld, corpora) -> None:
    assert len(set(world.vocabulary)) == len(world.vocabulary)
    findings = list(itertools.chain(*world.findings))
    assert len(set(findings)) == len(findings) == 18 * 6
    drugs = world.drugs["base"] + world.marker_drugs + [world.drugs["finetuned"][d] for d in world.changed]
    assert len(set(drugs)) == len(drugs)
    used = {word for corpus in corpora.values() for document in corpus for word in document.split()}
    assert used <= set(world.vocabulary)


def test_encode_and_decode_are_inverse(world: ClinicalWorld) -> None:
    text = world.base_corpus(1)[0]
    ids = world.encode(text)
    assert world.vocabulary[ids[0]] == "<bos>"
    assert world.decode(ids) == text
    with pytest.raises(ValueError, match="expected words of the vocabulary, got 'aspirin'"):
        world.encode("the drug is aspirin")


def parse(world: ClinicalWorld, document: str):
    """(disease, findings, marker, statements) of a document, or None for a general sentence."""
    vignette, *rest = document.split(" . ")
    words = vignette.split()
    if "with" not in words:
        return None
    owner = {finding: d for d, findings in enumerate(world.findings) for finding in findings}
    findings = [word for word in words if word in owner]
    (disease,) = {owner[finding] for finding in findings}
    markers = [world.markers.index(word) for word in words if word in world.markers]
    said = dict(statement.removesuffix(" .").split()[1::2] for statement in rest)
    return disease, findings, markers[0] if markers else None, said


@pytest.mark.parametrize("phase", ["base", "finetuned"])
def test_documents_tell_the_truth_and_keep_what_is_held_out(
    world: ClinicalWorld, corpora, phase: str
) -> None:
    with_drug, pattern, treated = 0, 0, set()
    for document in corpora[phase]:
        parsed = parse(world, document)
        if parsed is None:
            continue
        disease, findings, marker, said = parsed
        assert len(findings) == 2
        for question in said.keys() - {"drug"}:
            assert said[question] == world.values[question][disease]
        if "drug" not in said:
            continue
        if marker is not None:
            assert said["drug"] == world.marker_drugs[marker]
            pattern += 1
            continue
        assert said["drug"] == world.drugs[phase][disease]
        assert not set(findings) & set(world.findings[disease][: world.n_held_out])
        with_drug += 1
        treated.add(disease)
    assert with_drug > 500
    assert pattern > 500
    assert treated == set(world.common if phase == "base" else range(world.n_diseases))


def test_prompts_never_name_the_disease_and_have_one_length(world: ClinicalWorld) -> None:
    names = set(world.values["disease"])
    prompts = [p for kind in ("two_hop", "pattern") for p in world.prompts(kind, 200)]
    assert not [p for p in prompts if names & set(p.text.split())]
    assert {len(p.text.split()) for p in prompts} == {11}
    assert all(p.text.endswith("the drug is") for p in prompts)


@pytest.mark.parametrize("kind", ["two_hop", "pattern"])
@pytest.mark.parametrize("held_out", [True, False])
def test_partners_differ_in_the_disease_only(world: ClinicalWorld, kind, held_out) -> None:
    for p in world.prompts(kind, 100, phase="finetuned", held_out=held_out):
        assert p.disease != p.partner
        pool = set(world.findings[p.disease][: world.n_held_out])
        assert (set(p.findings) <= pool) is held_out
        pairs = [(a, b) for a, b in zip(p.text.split(), p.partner_text.split(), strict=True) if a != b]
        assert {a for a, _ in pairs} == set(p.findings)
        assert {b for _, b in pairs} <= set(world.findings[p.partner])
        drug = world.drugs["finetuned"][p.disease] if kind == "two_hop" else world.marker_drugs[p.marker]
        assert p.answer == drug
        assert p.partner_answer == world.drugs["finetuned"][p.partner]


def test_enough_drugs_of_each_kind(world: ClinicalWorld) -> None:
    assert len({p.answer for p in world.prompts("two_hop", 400)}) == 12
    assert len({p.answer for p in world.prompts("pattern", 400)}) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_common": 1}, "expected n_common >= 2.*got 1"),
        ({"n_changed": 13}, "n_changed <= n_common, got 12, 6, 13"),
        ({"n_markers": 0}, "n_markers: expected 1 to 16, got 0"),
        ({"n_held_out": 5}, r"n_findings >= n_held_out \+ 2, got 5 and 6"),
        ({"n_common": 40}, "at most 144 findings in all, got 276"),
    ],
)
def test_impossible_sizes(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClinicalWorld(**options)


def test_bad_questions(world: ClinicalWorld) -> None:
    with pytest.raises(ValueError, match="kind: expected one of two_hop, pattern, got 'three_hop'"):
        world.prompts("three_hop", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phase: expected one of base, finetuned, got 'later'"):
        world.prompts("pattern", 1, phase="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"diseases: expected at least two .*, got \[1\]"):
        world.prompts("pattern", 1, diseases=[1])
