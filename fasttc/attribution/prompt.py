"""Prompts: text or token ids in, token ids and their names out."""

from typing import Any

import torch
from torch import Tensor

Prompt = str | list[int] | tuple[int, ...] | Tensor


def token_ids(prompt: Prompt, tokenizer: Any, *, prepend_bos: bool) -> Tensor:
    """``[T]`` int64 token ids.

    Token ids are used as given. Text is tokenised; if the first token is then not a special one and ``prepend_bos``
    is set, the beginning-of-sequence token is put in front (the padding or end token where there is none), because
    features and errors at position 0 are zeroed.

    Raises:
        ValueError: text without a tokenizer, an empty prompt, ids that are not one list of integers.
    """
    if not isinstance(prompt, str):
        try:
            ids = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"prompt: expected text or token ids [T], got {prompt!r:.80} (attribute_many takes several prompts)"
            ) from error
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"prompt: expected text or token ids [T], got {ids.dtype} {list(ids.shape)}")
        return ids.long().cpu()
    if tokenizer is None:
        raise ValueError("prompt: expected token ids, or a tokenizer for the text, got text alone")
    ids = list(tokenizer(prompt)["input_ids"])
    if prepend_bos and (not ids or ids[0] not in set(tokenizer.all_special_ids)):
        names = ("bos_token_id", "pad_token_id", "eos_token_id")
        front = [number for name in names if (number := getattr(tokenizer, name, None)) is not None]
        ids = front[:1] + ids
    if not ids:
        raise ValueError(f"prompt: expected text with at least one token, got {prompt!r}")
    return torch.tensor(ids)


def token_names(ids: Tensor, tokenizer: Any) -> list[str]:
    """Each token as the text that it adds behind another one; ids as strings without a tokenizer.

    Alone, a word would lose the space in front of it with many tokenizers: decoders strip what begins a text, and those
    of whole words put spaces only between. Special tokens are shown by their names. Text that is not its own in any
    context (a part of a UTF-8 character) is what the tokenizer makes of it alone.
    """
    numbers = ids.tolist()
    if tokenizer is None:
        return [str(number) for number in numbers]
    special = set(tokenizer.all_special_ids)
    alone = tokenizer.batch_decode([[number] for number in numbers])
    anchor, before = _anchor(tokenizer, special)
    if anchor is None:
        return alone
    behind = tokenizer.batch_decode([[anchor, number] for number in numbers])
    return [
        pair.removeprefix(before) if number not in special and pair.startswith(before) else text
        for number, text, pair in zip(numbers, alone, behind, strict=True)
    ]


def _anchor(tokenizer: Any, special: set[int]) -> tuple[int | None, str]:
    """The first token that is a word or a part of one wherever it stands, and its text at the beginning of a text."""
    for number in range(len(tokenizer)):
        text = "" if number in special else tokenizer.decode([number]).strip()
        if text.isalnum() and tokenizer.decode([number, number]).strip().startswith(text):
            return number, tokenizer.decode([number])
    return None, ""
