"""Shared fixtures. Reference data lives outside the project: tests that need it skip without it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell put in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests and the processes they start take Ctrl-C

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of reference models, texts and oracle graphs; skips the test where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"reference data not found at {SHARED_DATA}")
    return SHARED_DATA.resolve()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Tiny random models of every supported family, with everything switched on that could go wrong.

_TINY_COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "attention_bias": True,
}  # fmt: skip
_TINY_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_TINY_QWEN = _TINY_COMMON | {
    "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": _TINY_WINDOWS,
}  # fmt: skip
_TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # family -> (class of its configuration, arguments)
    "llama": ("LlamaConfig", _TINY_COMMON | {"mlp_bias": True}),
    "qwen2": ("Qwen2Config", _TINY_QWEN),
    "qwen3": ("Qwen3Config", _TINY_QWEN),
    "mistral": ("MistralConfig", _TINY_COMMON | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        _TINY_COMMON
        | {
            "sliding_window": 5, "layer_types": _TINY_WINDOWS, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _TINY_COMMON
        | {
            "sliding_window": 5, "layer_types": _TINY_WINDOWS, "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 61, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64,
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1,
            "pad_token_id": 0, "use_parallel_residual": True,
        },
    ),
}  # fmt: skip


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter: activations of order one, gains not one, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    scaled_embedding = "gemma" in model.config.model_type
    with torch.no_grad():
        for module in model.modules():
            fan_in_first = type(module).__name__ == "Conv1D"  # GPT-2 stores its matrices as [in, out]
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                if isinstance(module, torch.nn.Embedding):
                    scale = parameter.shape[1] ** -0.5 if scaled_embedding else 0.5
                    parameter.copy_(scale * noise)
                elif parameter.ndim == 2:
                    fan_in = parameter.shape[0] if fan_in_first else parameter.shape[1]
                    parameter.copy_(1.5 * fan_in**-0.5 * noise)
                elif name == "bias":
                    parameter.copy_(0.3 * noise)
                else:  # a norm's gain, stored as itself (starts at one) or minus one (starts at zero)
                    parameter.add_(0.3 * noise)


@pytest.fixture(params=sorted(_TINY_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once for each of the eight families; use it with `tiny_model(family)`."""
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(family, *, seed=0, dtype=torch.float32, **config)`: a random causal model in eval mode.

    Three layers, width 32, vocabulary 61, eager attention. Where the family has them: 4 query heads over 2
    key-value heads of size 12 (so that heads times head size is not the width), attention and MLP biases, a
    sliding window of 5 tokens (on layers 0 and 2; Mistral: on all), soft-capping, pre- and post-norms, query and
    key norms, random gains and biases. `config` overrides arguments of the configuration by transformers' names.
    """

    def make(
        family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
    ) -> torch.nn.Module:
        transformers = pytest.importorskip("transformers")
        class_name, arguments = _TINY_FAMILIES[family]
        configuration = getattr(transformers, class_name)(**(arguments | config))
        model = transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation="eager")
        _randomise(model, seed)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Word-level tokenizer for `tiny_model`: 0 `<pad>`, 1 `<eos>`, 2 `<bos>`, 3 `<unk>`, then `t4` to `t60`.

    Prepends `<bos>`.
    """
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"t{i}" for i in range(4, 61)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
