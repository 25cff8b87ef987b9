"""Loads a language model and its tokenizer from a folder or the hub. Never runs code from either."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fasttc.models.families import family_of

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


def load(
    ref: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model of a supported family, in evaluation mode, with eager attention.

    Args:
        ref: a folder written by ``save_pretrained``, or a hub id ``user/name[@revision]``.
        dtype: of the weights, also by name ("float32"); as saved when None.
        device: where to put it; the CPU when None.
        device_map: instead of ``device``, for a model that no single one can hold: "auto", or devices by module, as
            transformers takes it (with accelerate). Capture, training and evaluation go along.

    Returns:
        (model, tokenizer); the tokenizer is None where there is none beside the model.

    Raises:
        ValueError: one line saying what is wrong: no such folder, not a model, unknown family, remote code needed,
            tensors missing, hub not reachable, unknown dtype, no such device, both device and device_map.
    """
    import transformers

    where, options = _locate(ref)
    if device is not None and device_map is not None:
        raise ValueError(f"device_map: expected none beside device {str(device)!r}, got {device_map!r}")
    dtype, device = _dtype(dtype), check_device(device)
    spread = {} if device_map is None else {"device_map": device_map}
    with _plain_errors(ref):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    try:
        family_of(config.get_text_config().model_type)
    except ValueError as error:
        raise ValueError(f"{ref}: {error}") from error
    with _plain_errors(ref), _quiet(Path(where).is_dir()):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where,
            dtype="auto" if dtype is None else dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            **spread,
            **options,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise ValueError(
            f"{ref}: expected all weights of the model, got none for {len(missing)}: {missing[0]}, ..."
        )
    if device_map is None:
        model.to(device)
    return model.eval(), _tokenizer(ref, where, options)


def _locate(ref: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{ref}: expected a model folder with a config.json, got one without")
        return str(path), {}
    if path.exists():
        raise ValueError(f"{ref}: expected a model folder or a hub id, got a file")
    match = _HUB_ID.fullmatch(str(ref))
    if isinstance(ref, Path) or match is None or str(ref).startswith((".", "/", "~")):
        raise ValueError(f"{ref}: expected a model folder or a hub id, got a path that does not exist")
    return match["repo"], {"revision": match["revision"]} if match["revision"] else {}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value: Any = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype!r}")
    return value


def check_device(device: torch.device | str | None) -> torch.device:
    """The device of that name, the CPU when None; ValueError where this machine has none."""
    try:
        chosen = torch.device("cpu" if device is None else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # unknown name; known, but not on this machine
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one of this machine, got {str(device)!r} ({reason})") from error
    return chosen


@contextmanager
def _plain_errors(ref: str | Path) -> Iterator[None]:
    """The many errors of loading, as one line each; their full text stays in the chain."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = str(error)
        reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in text:
            reason = "it needs code from the repository, which is never run"
        elif not Path(ref).is_dir() and isinstance(error, OSError):
            reason = f"no such folder here, and the hub did not give it ({reason})"
        raise ValueError(f"{ref}: cannot load the model: {reason}") from error


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """No progress bar for weights that are read from the disk; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if wanted:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if wanted and shown:
            logging.enable_progress_bar()


def _tokenizer(ref: str | Path, where: str, options: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    local = Path(where).is_dir()
    if local and not any((Path(where) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    config: dict[str, Any] = {}
    try:
        config = get_tokenizer_config(where, trust_remote_code=False, **options)
        # Where a checkpoint names no class of its own, AutoTokenizer of transformers 5 may take that of the model's
        # family and build another tokenizer from the same file (Qwen2: unknown words vanish).
        generic = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader: Any = transformers.PreTrainedTokenizerFast if generic else transformers.AutoTokenizer
        return loader.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises plain Exception
        if not local and not config:
            return None
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(f"{ref}: cannot load the tokenizer: {reason}") from error
