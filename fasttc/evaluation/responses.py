"""How long a model's responses are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fasttc.models import evaluating, sample


@torch.no_grad()
def response_length(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]] | None = None,
    *,
    n: int = 64,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> float:
    """Mean number of new tokens before the end-of-text token; a response that does not end counts ``max_new_tokens``.

    Args:
        model: a Hugging Face causal language model, overridden as it may be.
        tokenizer: of the model; says which tokens begin and end a text.
        prompts: token ids to answer, in turn; None: the beginning-of-text token alone.
        n: responses in all.
        max_new_tokens: of one response.
        temperature: of the draws; 0 takes the most probable token.
        seed: of the draws. The same seed gives the same responses on the same device.

    Raises:
        ValueError: a tokenizer without the token that is needed, no prompts, or ``n`` below 1.
    """
    eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
    bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
    if eos_id is None:
        raise ValueError("tokenizer: expected one with an end-of-text token, which ends a response, got none")
    starts = prompts
    if starts is None:
        if bos_id is None:
            raise ValueError(
                "prompts: expected some for a tokenizer without a beginning-of-text token, got None"
            )
        starts = [[bos_id]]
    if not starts or n < 1:
        raise ValueError(f"expected at least one prompt and one response, got {len(starts)} and {n}")
    total = 0
    with evaluating(model):
        for i, start in enumerate(starts[:n]):
            count = len(range(i, n, len(starts)))  # of the n responses, those whose turn it is
            rows = sample(
                model,
                start,
                n=count,
                max_tokens=len(start) + max_new_tokens,
                temperature=temperature,
                seed=seed + i,
                eos_id=eos_id,
            )
            total += sum(len(row) - len(start) for row in rows)
    return total / n
