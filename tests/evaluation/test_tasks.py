"""Task accuracy against likelihoods computed by hand, and every question that cannot be asked."""

import math

import pytest
import torch

from fasttc.evaluation import Question, evaluate_task, read_questions
from fasttc.evaluation.tasks import token_f1

RECORDS = [
    {"q": "t5 t6", "a": "t7", "list": ["t7", "t8 t9"], "n": 1},
    {"q": "t9", "a": "t8", "list": ["t8", "t7"], "n": 0},
    {"q": "t10 t11 t12", "a": "t7", "list": ["t7", "t9"], "n": 0},
]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", dtype=torch.float64)


@torch.no_grad()
def by_hand(model, tokenizer, question, normalise):
    """log p(option | prompt) / length for every option, one sequence at a time, from all logits."""
    scores = []
    for option in question.options:
        prompt = tokenizer(question.prompt).input_ids
        ids = torch.tensor([tokenizer(f"{question.prompt} {option}").input_ids])
        log_p = model(ids).logits.log_softmax(-1)[0]
        total = sum(float(log_p[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1]))
        length = {"none": 1, "bytes": len(option), "tokens": ids.shape[1] - len(prompt)}[normalise]
        scores.append(total / length)
    return scores


@pytest.mark.parametrize("normalise", ["none", "bytes", "tokens"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_likeliest_option_is_chosen(model, tiny_tokenizer, normalise, batch_size):
    options = tuple(f"t{i}" if i % 3 else f"t{i} t{i + 1}" for i in range(7, 30))
    questions = [Question(f"t{4 + i} t{5 + 2 * i}", options[i], options) for i in range(12)]
    report = evaluate_task(model, questions, tiny_tokenizer, normalise=normalise, batch_size=batch_size)
    for question, answer in zip(questions, report.answers, strict=True):
        scores = by_hand(model, tiny_tokenizer, question, normalise)
        assert answer == options[scores.index(max(scores))]
    right = [q.answer == a for q, a in zip(questions, report.answers, strict=True)]
    assert report.accuracy == sum(right) / 12
    assert report.normalise == normalise
    assert len(set(report.answers)) > 1


def test_counts_per_class(model, tiny_tokenizer):
    questions = read_questions(RECORDS, prompt="{q}", answer="{a}", options=["t7", "t8"])
    report = evaluate_task(model, questions, tiny_tokenizer)
    assert {name: count.questions for name, count in report.classes.items()} == {"t7": 2, "t8": 1}
    assert sum(count.chosen for count in report.classes.values()) == 3
    assert sum(count.correct for count in report.classes.values()) == round(3 * report.accuracy)
    shares = [count.correct / count.questions for count in report.classes.values()]
    assert report.balanced_accuracy == pytest.approx(sum(shares) / 2)
    assert (report.majority, report.chance) == (pytest.approx(2 / 3), 0.5)
    assert report.to_dict()["classes"]["t8"] == {
        "questions": 1, "chosen": report.classes["t8"].chosen, "correct": report.classes["t8"].correct
    }  # fmt: skip


def test_options_of_each_record(model, tiny_tokenizer):
    questions = read_questions(RECORDS, prompt="{q}", answer="{n}", options="{list}")
    assert [question.answer for question in questions] == ["t8 t9", "t8", "t7"]
    report = evaluate_task(model, questions, tiny_tokenizer)
    assert report.classes == {}
    assert report.balanced_accuracy is None
    assert all(a in q.options for q, a in zip(questions, report.answers, strict=True))


def test_long_prompts_lose_their_beginning(model, tiny_tokenizer):
    long = " ".join(f"t{4 + i % 50}" for i in range(100))
    short = " ".join(long.split()[-61:])  # 64 positions: <bos>, two of the longer option, the rest
    one, two = (
        evaluate_task(model, [Question(text, "t9 t7", ("t8 t9", "t9 t7"))], tiny_tokenizer).answers
        for text in (long, short)
    )
    assert one == two
    with pytest.raises(ValueError, match="expected options that leave room for a prompt in 64 positions"):
        evaluate_task(model, [Question("t4", "t7", ("t7", long))], tiny_tokenizer)


def test_free_text_is_the_likeliest_continuation(model, tiny_tokenizer):
    questions = read_questions(RECORDS, prompt="{q}", answer="{a}")
    report = evaluate_task(model, questions, tiny_tokenizer, max_new_tokens=3)
    for question, answer in zip(questions, report.answers, strict=True):
        ids = tiny_tokenizer(question.prompt).input_ids
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        n = len(tiny_tokenizer(question.prompt).input_ids)
        assert answer == tiny_tokenizer.decode(ids[n:], skip_special_tokens=True).strip()
    right = [Question(q.prompt, a or "x") for q, a in zip(questions, report.answers, strict=True)]
    again = evaluate_task(model, right, tiny_tokenizer, max_new_tokens=3)
    assert again.accuracy == sum(bool(a) for a in report.answers) / 3
    assert again.f1 == pytest.approx(again.accuracy)
    assert again.normalise is None


@pytest.mark.parametrize(("text", "reference", "f1"), [
    ("The heart.", "a heart", 1.0),
    ("heart heart", "heart", 2 / 3),
    ("left heart", "right heart valve", 2 / 5),
    ("", "heart", 0.0),
    ("", "the", 1.0),
    ("beta-blocker", "betablocker", 1.0),
])  # fmt: skip
def test_word_f1(text, reference, f1):
    assert math.isclose(token_f1(text, reference), f1)
    assert math.isclose(token_f1(reference, text), f1)


def test_the_model_is_put_back_and_can_have_its_mlps_replaced(model, tiny_tokenizer):
    from fasttc import replaced
    from fasttc.models import default_sites
    from fasttc.nn import Transcoder, TranscoderSet

    sites = default_sites(model)
    tcs = TranscoderSet([Transcoder(32, 40, k=3, dtype=torch.float64) for _ in sites], sites)
    options = tuple(f"t{i}" for i in range(7, 40))
    questions = [Question(f"t{4 + i} t{5 + 2 * i}", options[i], options) for i in range(8)]
    model.train()
    as_it_is = evaluate_task(model, questions, tiny_tokenizer)
    assert model.training
    with replaced(model, tcs):
        instead = evaluate_task(model, questions, tiny_tokenizer)
    assert as_it_is.answers != instead.answers


@pytest.mark.parametrize(("options", "words"), [
    ({"options": ["t7", "t8", "t9"]}, r"task: expected questions of every class, got none for t9 \(of 3: t7 2, t8 1\)"),
    ({"options": ["t7"]}, r"options: expected at least two different ones, got \['t7'\]"),
    ({"options": ["t7", "t7"]}, "options: expected at least two different ones"),
    ({"options": ["t8", "t9"]}, "task, record 0: expected an answer among t8, t9, got 't7'"),
    ({"options": "{q}"}, "options: expected the field 'q' of task, record 0 to hold a list"),
    ({"answer": "{b}"}, "text: expected the field 'b' in task, record 0; it has q, a, list, n"),
    ({"answer": ""}, "task, record 0: expected an answer, got none"),
])  # fmt: skip
def test_wrong_questions(options, words):
    with pytest.raises(ValueError, match=words):
        read_questions(RECORDS, **{"prompt": "{q}", "answer": "{a}", **options})


def test_an_answer_that_is_no_option():
    with pytest.raises(ValueError, match="answer: expected one of b, c, got 'a'"):
        Question("q", "a", ("b", "c"))


@pytest.mark.parametrize(("options", "words"), [
    ({"normalise": "length"}, "normalise: expected one of bytes, tokens, none, got 'length'"),
    ({"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
    ({"max_new_tokens": True}, "max_new_tokens: expected an int >= 1, got True"),
    ({"max_new_tokens": 64}, "max_new_tokens: expected fewer than the model's 64 positions, got 64"),
    ({"questions": []}, "task: expected questions, got none"),
    ({"questions": [Question("a", "b"), Question("a", "b", ("b", "c"))]}, "for all questions or for none, got both"),
    ({"tokenizer": None}, "tokenizer: expected one for a task of text, got None"),
    ({"chat": True}, "chat: expected a tokenizer with a chat template, got none"),
])  # fmt: skip
def test_wrong_options(model, tiny_tokenizer, options, words):
    arguments = {"questions": [Question("t5", "t6")], "tokenizer": tiny_tokenizer} | options
    with pytest.raises(ValueError, match=words):
        evaluate_task(model, arguments.pop("questions"), arguments.pop("tokenizer"), **arguments)
