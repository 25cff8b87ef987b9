"""Prompts and answers as tokens: where the answer starts, with and without a chat template."""

from collections.abc import Sequence
from typing import Any

from fasttc.training.documents import Document, Exchange


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, no special tokens added; of any object with ``encode`` where it cannot be called."""
    if callable(tokenizer):
        encoded: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return encoded["input_ids"]
    return [list(tokenizer.encode(text)) for text in texts]


def encode_exchanges(
    tokenizer: Any, exchanges: Sequence[Exchange], *, chat: bool = False, eos_id: int | None = None
) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer together, and how many of the first belong to the prompt.

    They are encoded as one text, as a reader would write it. The prompt ends where its own encoding and that of the
    whole part: a token that spans the seam belongs to the answer.

    Args:
        chat: puts them into the tokenizer's chat template, as a user's and an assistant's turn.
        eos_id: token put after the answer.

    Raises:
        ValueError: a chat template that does not continue a prompt it was given.
    """
    pairs = [chat_texts(tokenizer, e) if chat else (e.prompt, e.text) for e in exchanges]
    prompts, wholes = (encode_texts(tokenizer, texts) for texts in zip(*pairs, strict=True))
    end = [] if eos_id is None else [eos_id]
    return [
        ([*whole, *end], _common_start(prompt, whole)) for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def chat_texts(tokenizer: Any, exchange: Exchange) -> tuple[str, str]:
    """(what comes before the answer, all) in the tokenizer's chat template."""
    turns = [{"role": "user", "content": exchange.prompt}]
    before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    turns.append({"role": "assistant", "content": exchange.answer})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(before):
        raise ValueError(
            f"chat: expected a template that continues the prompt {before[-40:]!r}, got {whole[-80:]!r}"
        )
    return before, whole


def check_chat(documents: Sequence[Document], tokenizer: Any) -> None:
    """ValueError where a chat template is asked for and there is none, or nothing to put into it."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: expected a tokenizer with a chat template, got none")
    if not isinstance(documents[0], Exchange):
        raise ValueError("chat: expected records with prompt and answer, got plain text or token ids")


def _common_start(one: Sequence[int], two: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return i
    return min(len(one), len(two))
