"""Text from a model: its own samples are training data that needs no data set."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    model: Any,
    prompt_ids: list[int],
    *,
    n: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Draws ``n`` continuations of one prompt by sampling from the model's own distribution.

    Args:
        model: a Hugging Face causal language model.
        prompt_ids: tokens every sample begins with (at least one: usually BOS).
        n: samples.
        max_tokens: length of each sample at most, the prompt included.
        temperature: divides the logits; 0 takes the most probable token.
        seed: of the draws; the same seed gives the same samples on the same device.
        batch_size: samples drawn together.
        eos_id: a sample ends before this token; None: every sample has full length.

    Returns:
        ``n`` lists of token ids, the prompt included.

    Raises:
        ValueError: empty prompt, no room for a new token, or a length beyond the model's context.
    """
    if not prompt_ids:
        raise ValueError("prompt: expected at least one token id, got none")
    limit = getattr(model.config, "max_position_embeddings", None)
    if max_tokens <= len(prompt_ids):
        raise ValueError(f"max_tokens: expected more than the prompt's {len(prompt_ids)}, got {max_tokens}")
    if limit is not None and max_tokens > limit:
        raise ValueError(f"max_tokens: expected at most the model's context of {limit}, got {max_tokens}")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    samples: list[list[int]] = []
    while len(samples) < n:
        rows = min(batch_size, n - len(samples))
        prompt = torch.tensor([prompt_ids] * rows, device=device)
        samples += _cut(
            _continue(model, prompt, max_tokens, temperature, generator, eos_id), len(prompt_ids), eos_id
        )
    return samples


def _continue(
    model: Any,
    ids: Tensor,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
    eos_id: int | None,
) -> Tensor:
    """Extends every row to ``max_tokens`` (or until all have ended) with a key-value cache."""
    cache, step = None, ids
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < max_tokens and not bool(ended.all()):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature == 0:
            step = logits.argmax(-1, keepdim=True)
        else:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, step], dim=1)
        if eos_id is not None:
            ended |= step[:, 0] == eos_id
    return ids


def _cut(ids: Tensor, n_prompt: int, eos_id: int | None) -> list[list[int]]:
    rows = ids.tolist()
    if eos_id is None:
        return rows
    return [row[: row.index(eos_id, n_prompt)] if eos_id in row[n_prompt:] else row for row in rows]
