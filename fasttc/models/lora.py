"""Low-rank adaptation (LoRA) of a model by PEFT: matrices beside the linear layers, merged into them at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fasttc.models.anatomy import unwrap


@contextmanager
def lora(model: nn.Module, rank: int, alpha: float) -> Iterator[tuple[nn.Module, list[str]]]:
    """Inside, ``W x`` of every linear layer of every block is ``(W + alpha / rank · B A) x`` (Hu et al. 2021).

    A [rank, in] is drawn from the global generator, B [out, rank] is zero: the model starts as it was. Embeddings and
    the unembedding have none.

    Args:
        model: a transformers causal language model, changed in place.
        rank, alpha: of the low-rank matrices.

    Yields:
        The wrapped model, and the names of the added matrices in its ``named_parameters()``. When the block ends, they
        are added to the weights and the wrapper is taken off; when it fails, they are dropped and the model is as it
        was.

    Raises:
        ValueError: PEFT is not installed; the model has PEFT adapters already.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("parameters: 'lora' needs peft: pip install 'fasttc[finetune]'") from None
    _, inner = unwrap(model)
    if inner is not model or any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()):
        raise ValueError("model: expected one without wrappers for 'lora', got one; merge its adapters first")
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kind: Any = peft.LoraConfig  # its annotations are narrower than what it takes
    config = kind(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    names = [name for name, _ in wrapped.named_parameters() if ".lora_" in name]
    try:
        yield wrapped, names
    except BaseException:
        wrapped.unload()
        raise
    else:
        wrapped.merge_and_unload()
    finally:
        vars(model).pop("peft_config", None)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
