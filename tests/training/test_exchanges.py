"""Prompts are read and not learned: where answers start, what is packed, what the loss is over."""

import json

import pytest
import torch
from torch.nn import functional as F

from fasttc.models import load
from fasttc.training import TokenData, finetune
from fasttc.training.causal import NextToken
from fasttc.training.data import open_data
from fasttc.training.documents import Exchange, digest, read_documents
from fasttc.training.exchanges import chat_texts, encode_exchanges
from fasttc.training.packing import NO_LABEL

CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant {% endif %}"
)


@pytest.fixture
def records():
    return [{"q": f"t{4 + i % 50} t{5 + i % 40}", "a": f"t{6 + i % 30}", "n": None} for i in range(60)]


def test_templates_make_exchanges(records):
    documents = read_documents(records[:2], prompt="{q}", answer="{a}")
    assert documents == [Exchange("t4 t5", "t6"), Exchange("t5 t6", "t7")]
    assert documents[0].text == "t4 t5 t6"
    assert Exchange("a ", "b").text == "a b"
    assert Exchange("a", "\nb").text == "a\nb"
    assert Exchange("", "b").text == "b"
    assert read_documents([{"q": "t4", "a": " "}, *records[:1]], prompt="{q}", answer="{a}") == documents[:1]


def test_an_exchange_falls_into_the_split_of_its_text(records, tiny_tokenizer, tiny_model):
    assert digest(Exchange("t4 t5", "t6"), 3) == digest("t4 t5 t6", 3)
    model = tiny_model("llama")
    exchanges = open_data(model, records, tiny_tokenizer, prompt="{q}", answer="{a}", context=16)
    texts = open_data(model, records, tiny_tokenizer, text="{q} {a}", context=16)
    assert exchanges.splits == texts.splits


@pytest.mark.parametrize(("options", "words"), [
    ({"prompt": "{q}"}, "prompt, answer: expected both or neither, got '{q}' and None"),
    ({"prompt": "{q}", "answer": "{a}", "text": "{q}"}, "text: expected none beside prompt and answer"),
    ({"prompt": "{q}", "answer": "{b}"}, "text: expected the field 'b' in .*record 0; it has q, a, n"),
    ({"prompt": "{q}", "answer": "{n}"}, "expected documents with text, found none"),
])  # fmt: skip
def test_wrong_templates(records, options, words):
    with pytest.raises(ValueError, match=words):
        read_documents(records, **options)


def test_plain_records_have_no_prompt():
    with pytest.raises(ValueError, match=r"record 0: expected an object with fields for '\{q\}', got str"):
        read_documents(["text"], prompt="{q}", answer="{a}")


def test_only_answers_have_labels(records, tiny_tokenizer):
    documents = read_documents(records, prompt="{q}", answer="{a}")
    data = TokenData(documents, tiny_tokenizer, context=16, bos_id=2, eos_id=1)
    batch = next(data.batches("train", 4))
    labelled = batch.labels != NO_LABEL
    # <bos> q q | a <eos>: the last of the prompt predicts the answer, the answer predicts the end
    assert torch.equal(labelled, batch.mask & ((batch.position_ids == 2) | (batch.position_ids == 3)))
    places = labelled[:, :-1].nonzero(as_tuple=True)
    assert torch.equal(batch.labels[:, :-1][places], batch.input_ids[:, 1:][places])
    assert set(batch.labels[batch.position_ids == 3].tolist()) <= {1, NO_LABEL}
    assert (batch.mask.sum() > labelled.sum()).item(), "transcoders still learn from prompts"


def test_a_long_prompt_leaves_pieces_without_answer_out(tiny_tokenizer):
    documents = [Exchange(" ".join(["t5"] * 40), "t9 t10")] * 3
    data = TokenData(documents, tiny_tokenizer, context=8, bos_id=2, eos_id=1, fractions=(1, 0, 0))
    rows = data.rows([0])
    assert rows.ids.tolist() == [[2, 5, 5, 5, 5, 5, 9, 10], [2, 1, 0, 0, 0, 0, 0, 0]]
    assert rows.learned.tolist()[0] == [False] * 6 + [True] * 2


class _Letters:
    """A tokenizer with pairs: the prompt's last letter and the answer's first may become one token."""

    def encode(self, text):
        out, i = [], 0
        while i < len(text):
            step = 2 if text[i : i + 2] == "ab" else 1
            out.append(100 if step == 2 else ord(text[i]))
            i += step
        return out


def test_a_token_over_the_seam_belongs_to_the_answer():
    ((ids, start),) = encode_exchanges(_Letters(), [Exchange("xa ", "b")])
    assert (ids, start) == ([ord("x"), ord("a"), ord(" "), ord("b")], 3)

    class Glued(Exchange):
        @property
        def text(self):
            return self.prompt + self.answer

    ((ids, start),) = encode_exchanges(_Letters(), [Glued("xa", "b")])
    assert (ids, start) == ([ord("x"), 100], 1)


def test_chat_templates(records, tiny_tokenizer, tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    before, whole = chat_texts(tiny_tokenizer, Exchange("t4", "t5"))
    assert before == "<bos>user t4 <eos> <bos>assistant "
    assert whole == before + "t5 <eos> "
    options = {"prompt": "{q}", "answer": "{a}", "chat": True, "context": 16}
    data = open_data(tiny_model("llama"), records, tiny_tokenizer, **options)
    (ids,) = data.tokens([0])
    assert ids.tolist() == [3, 4, 5, 1, 2, 3, 6, 1], (
        "<bos> comes with packing, unknown words are 3, no second <eos>"
    )
    rows = data.rows([0])
    assert rows.learned[0].tolist()[:9] == [False] * 7 + [True] * 2


def test_chat_without_a_template_or_a_prompt(records, tiny_tokenizer, tiny_model, monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template, got none"):
        open_data(model, records, tiny_tokenizer, prompt="{q}", answer="{a}", chat=True, context=16)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    with pytest.raises(ValueError, match="chat: expected records with prompt and answer, got plain text"):
        open_data(model, records, tiny_tokenizer, text="{q}", chat=True, context=16)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages | length }} t5")
    with pytest.raises(ValueError, match="chat: expected a template that continues the prompt"):
        open_data(model, records, tiny_tokenizer, prompt="{q}", answer="{a}", chat=True, context=16).tokens(
            [0]
        )


def test_the_loss_is_over_answers_only(records, tiny_tokenizer, tiny_model):
    model = tiny_model("llama")
    data = open_data(model, records, tiny_tokenizer, prompt="{q}", answer="{a}", context=16)
    batch = next(data.batches("train", 4))
    total, count = NextToken(model)(batch)
    logits = model(**batch.model_inputs).logits.double()
    ends = (batch.mask & (batch.position_ids.eq(2) | batch.position_ids.eq(3))).nonzero().tolist()
    expected = sum(F.cross_entropy(logits[r, t], batch.input_ids[r, t + 1]) for r, t in ends)
    assert count == len(ends)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    options = {"tokens": 600, "batch_size": 4, "context": 16, "progress": False, "lr": 1e-2}
    report = finetune(model, records, tiny_tokenizer, prompt="{q}", answer="{a}", **options)[1]
    assert report.ce_after < report.ce_before - 0.3
    assert report.config["prompt"] == "{q}"


def test_pubmedqa_prompts(shared_data):
    model, tokenizer = load(shared_data / "models" / "stories260K")
    path = shared_data / "pubmedqa" / "ori_pqal.json"
    data = open_data(model, path, tokenizer, prompt="{QUESTION}", answer="{final_decision}")
    record = next(iter(json.loads(path.read_text()).values()))
    (ids,) = data.tokens([0])
    prompt = data._prompts[0]
    assert tokenizer.decode(ids[:prompt]).strip() == record["QUESTION"].strip()
    assert tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip() == record["final_decision"]
