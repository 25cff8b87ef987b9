"""circuit-tracer's per-layer transcoder sets: ``config.yaml`` and ``layer_{i}.safetensors``.

Tensors (feature-major, as ours): ``W_enc [F, D]``, ``b_enc [F]``, ``W_dec [F, D]``, ``b_dec [D]``, for JumpReLU
``activation_function.threshold [F]``, with a skip ``W_skip [D, D]`` (``x W_skip^T``), for TopK an optional scalar
``k``. TopK passes no ReLU there, so negative values survive. Layout as written by decoderesearch/circuit-tracer 0.4.1.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import yaml

from fasttc.formats._format import Format, scalar, shapes_of
from fasttc.nn import Site, Transcoder, TranscoderConfig, io
from fasttc.nn.site import ReadKind, WriteKind

CONFIG_NAME = "config.yaml"
THRESHOLD = "activation_function.threshold"

# TransformerLens hook -> what is read there.
INPUT_HOOKS: dict[str, ReadKind] = {
    "mlp.hook_in": "mlp_in",
    "ln2.hook_normalized": "normalized",
    "hook_resid_mid": "resid_mid",
}
# hook_mlp_out is what is added to the residual, so after the post-norm of the models that have one.
OUTPUT_HOOKS: dict[str, WriteKind] = {"mlp.hook_out": "mlp_out", "hook_mlp_out": "mlp_out_post"}
DEFAULT_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}

_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")


def recognises(path: Path) -> bool:
    """A folder with ``layer_{i}.safetensors`` files, or with a ``config.yaml`` of the kind transcoder_set."""
    if _layer_files(path):
        return True
    if not (path / CONFIG_NAME).is_file():
        return False
    try:
        return _settings(path).get("model_kind") == "transcoder_set"
    except ValueError:
        return False


def read(path: Path) -> tuple[list[io.Loader], list[Site], dict[str, Any]]:
    """Reads the settings and the headers of all layers; weights are read by the returned loaders.

    A set without ``config.yaml`` (some published ones lack it) is taken to read and write at the MLP itself, with
    a warning.

    Raises:
        ValueError: not a per-layer set; a hook or activation that is not known; a layer missing in the sequence;
            layers of different widths; tensors missing, unexpected or of the wrong shape.
    """
    settings = _settings(path)
    kind = settings.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise ValueError(f"{path}: model_kind: expected transcoder_set, got {kind!r}")
    files = _layer_files(path)
    if not files:
        raise ValueError(f"{path}: expected layer_0.safetensors and so on beside {CONFIG_NAME}, found none")
    if missing := sorted(set(range(max(files) + 1)) - files.keys()):
        raise ValueError(f"{path}: expected layers 0 to {max(files)}, missing {missing}")
    configs = [_config(files[layer], settings) for layer in range(len(files))]
    for layer, config in enumerate(configs):
        for name in ("d_in", "d_out", "n_features"):
            first, here = getattr(configs[0], name), getattr(config, name)
            if here != first:
                raise ValueError(f"{path}: layer {layer}: expected {name} {first} as in layer 0, got {here}")
    loaders = [
        lambda file=files[layer], config=config: _load(file, config) for layer, config in enumerate(configs)
    ]
    metadata = json.loads(json.dumps({"format": FORMAT.name, **settings}, default=str))
    return loaders, _sites(path, settings, len(files)), metadata


FORMAT = Format("circuit-tracer", recognises, read)


def _layer_files(path: Path) -> dict[int, Path]:
    found = {file: _LAYER_FILE.fullmatch(file.name) for file in path.glob("layer_*.safetensors")}
    return {int(match[1]): file for file, match in found.items() if match}


def _settings(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"expected a YAML file, {file} is not one: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected settings by name, got {type(content).__name__}")
    return content


def _sites(path: Path, settings: dict[str, Any], n_layers: int) -> list[Site]:
    if not (path / CONFIG_NAME).is_file():
        warnings.warn(
            f"{path} has no {CONFIG_NAME}: assuming that it reads {DEFAULT_HOOKS['feature_input_hook']} and "
            f"writes {DEFAULT_HOOKS['feature_output_hook']}; an FVU above 1 says that it does not",
            stacklevel=2,
        )
        settings = DEFAULT_HOOKS
    x = _hook(path, settings, "feature_input_hook", INPUT_HOOKS)
    y = _hook(path, settings, "feature_output_hook", OUTPUT_HOOKS)
    model = str(settings.get("model_name", "")).lower()
    # Instruction-tuned Gemma 3 opens with <bos><start_of_turn>user\n; circuit-tracer leaves all four out.
    zero_positions = 4 if "gemma-3" in model and model.endswith("-it") else 1
    return [Site(layer, x, y, zero_positions=zero_positions) for layer in range(n_layers)]


def _hook(path: Path, settings: dict[str, Any], name: str, known: dict[str, Any]) -> Any:
    hook = settings.get(name)
    if hook not in known:
        raise ValueError(f"{path / CONFIG_NAME}: {name}: expected one of {', '.join(known)}, got {hook!r}")
    return known[hook]


def _config(file: Path, settings: dict[str, Any]) -> TranscoderConfig:
    shapes = shapes_of(file)
    for name in ("W_enc", "W_dec"):
        if name not in shapes:
            raise ValueError(f"{file}: missing tensors [{name!r}], found {sorted(shapes)}")
        if len(shapes[name]) != 2:
            raise ValueError(f"{file}: {name} expected shape [F, D], got {list(shapes[name])}")
    (n_features, d_in), d_out = shapes["W_enc"], shapes["W_dec"][1]
    activation, k = _activation(file, shapes, settings)
    skip = "W_skip" in shapes
    try:
        config = TranscoderConfig(d_in, n_features, d_out, activation, k, skip, relu=activation != "topk")  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    io.check_shapes(config, _canonical(shapes), str(file))
    return config


def _activation(
    file: Path, shapes: dict[str, tuple[int, ...]], settings: dict[str, Any]
) -> tuple[str, int | None]:
    """What ``config.yaml`` says; where it says nothing, what the tensors say."""
    k = settings.get("k")
    if "k" in shapes:
        stored = scalar(file, "k")
        if k is not None and stored != k:
            raise ValueError(f"{file}: expected k = {k} as in {CONFIG_NAME}, got the tensor k = {stored}")
        k = stored
    implied = "jumprelu" if THRESHOLD in shapes else "topk" if "k" in shapes else "relu"
    named = settings.get("activation", implied)
    if named not in ("relu", "jumprelu", "topk"):
        raise ValueError(
            f"{file.parent / CONFIG_NAME}: activation: expected relu, jumprelu or topk, got {named!r}"
        )
    return named, (k if named == "topk" else None)


def _canonical(tensors: dict[str, Any]) -> dict[str, Any]:
    renamed = {"threshold" if name == THRESHOLD else name: tensor for name, tensor in tensors.items()}
    renamed.pop("k", None)
    return renamed


def _load(file: Path, config: TranscoderConfig) -> Transcoder:
    return io.build(config, _canonical(io.read_tensors(file)), str(file))
