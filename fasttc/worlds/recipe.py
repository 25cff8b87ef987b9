"""The model of the clinical world: a small Gemma-2 and how it is trained, as data."""

from typing import Any

CLINICAL_MODEL: dict[str, Any] = {
    "architecture": "gemma2",
    "config": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.05,
    },
    "documents": 40_000,
    "context": 64,
    "training": {
        "tokens": 780_000,
        "batch_size": 40,
        "lr": 4e-3,
        "beta2": 0.98,
        "weight_decay": 0.05,
    },
}
"""``config`` goes to the transformers configuration, ``training`` to :func:`fasttc.training.finetune`."""
