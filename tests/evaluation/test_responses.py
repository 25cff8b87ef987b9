"""How long responses are: against samples counted one by one."""

import pytest

from fasttc.evaluation import response_length
from fasttc.models import sample


class Tokens:
    """A tokenizer as far as it matters here."""

    def __init__(self, bos: int | None = 2, eos: int | None = 7) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos


def counted(model, prompt: list[int], n: int, seed: int) -> list[int]:
    """New tokens before token 7 of samples that go on after it."""
    rows = sample(model, prompt, n=n, max_tokens=len(prompt) + 20, seed=seed)
    lengths = []
    for row in rows:
        new = row[len(prompt) :]
        lengths.append(new.index(7) if 7 in new else len(new))
    return lengths


def test_tokens_before_the_end_are_counted(tiny_model):
    model = tiny_model("llama")
    lengths = counted(model, [2], 40, seed=3)
    assert min(lengths) < 20 == max(lengths), "some end and some do not"
    found = response_length(model, Tokens(), n=40, max_new_tokens=20, seed=3)
    assert found == pytest.approx(sum(lengths) / 40)
    assert found == response_length(model, Tokens(), n=40, max_new_tokens=20, seed=3)


def test_prompts_take_turns(tiny_model):
    model = tiny_model("llama").train()
    prompts = [[2, 5], [2, 9, 11], [2]]
    found = response_length(model, Tokens(bos=None), prompts, n=5, max_new_tokens=20)
    assert model.training
    model.eval()
    lengths = [
        counted(model, prompt, n, i) for i, (prompt, n) in enumerate(zip(prompts, (2, 2, 1), strict=True))
    ]
    assert found == pytest.approx(sum(map(sum, lengths)) / 5)
    assert (
        response_length(model, Tokens(), prompts, n=1, max_new_tokens=20)
        == counted(model, prompts[0], 1, 0)[0]
    )


@pytest.mark.parametrize(
    ("tokenizer", "prompts", "n", "message"),
    [
        (Tokens(eos=None), None, 1, "tokenizer: expected one with an end-of-text token"),
        (
            Tokens(bos=None),
            None,
            1,
            "prompts: expected some for a tokenizer without a beginning-of-text token",
        ),
        (Tokens(), [], 1, "expected at least one prompt and one response, got 0 and 1"),
        (Tokens(), None, 0, "expected at least one prompt and one response, got 1 and 0"),
    ],
)
def test_nothing_to_count(tiny_model, tokenizer, prompts, n, message):
    with pytest.raises(ValueError, match=message):
        response_length(tiny_model("llama"), tokenizer, prompts, n=n)
