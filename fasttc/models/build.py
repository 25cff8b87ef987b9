"""New language models: random weights, a word-level tokenizer; for worlds whose vocabulary is known."""

from collections.abc import Sequence
from typing import Any

import torch


def build_causal_lm(recipe: dict[str, Any], vocabulary: Sequence[str], *, seed: int = 0) -> tuple[Any, Any]:
    """A new causal language model and a tokenizer that splits at spaces.

    Args:
        recipe: ``architecture`` (a ``model_type`` of transformers) and ``config`` (its sizes).
        vocabulary: words by token id; ``<pad>`` and ``<bos>`` among them.
        seed: of the random weights.

    Returns:
        (model in evaluation mode with eager attention, tokenizer). Both can be saved and loaded.

    Raises:
        ValueError: an architecture transformers does not know; a vocabulary without ``<pad>`` or ``<bos>``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    missing = {"<pad>", "<bos>"} - set(vocabulary)
    if missing:
        raise ValueError(f"vocabulary: expected the words <pad> and <bos>, got none for {sorted(missing)}")
    ids = {word: number for number, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", pad_token="<pad>")
    special = {"bos_token_id": ids["<bos>"], "pad_token_id": ids["<pad>"], "eos_token_id": None}
    try:
        config = AutoConfig.for_model(
            recipe["architecture"], vocab_size=len(ids), **special, **recipe["config"]
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"recipe: expected an architecture of transformers, got {recipe['architecture']!r}"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval(), tokenizer
