"""Adapters as nathanhu0/transcoder-adapters saves them: inside the weights of a whole model.

A Hugging Face folder whose ``config.json`` has ``transcoder_n_features``. Beside the base MLP of layer l its
safetensors files hold ``model.layers.{l}.mlp.transcoder_enc.weight [F, D]`` and ``.bias [F]``, and
``transcoder_dec.weight [D, F]`` with, under ``transcoder_dec_bias``, ``.bias [D]``. Only these are read; the model's
own weights in the folder are the hybrid's, and are not needed where target and base are at hand.
"""

import re
from pathlib import Path
from typing import Any

import torch

from fasttc._files import read_json
from fasttc.formats._format import Format, shapes_of
from fasttc.nn import Site, Transcoder, TranscoderAdapter, TranscoderConfig, io

CONFIG_NAME = "config.json"
_TENSOR = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.transcoder_(enc|dec)\.(weight|bias)")
_CANONICAL = {
    ("enc", "weight"): "W_enc",
    ("enc", "bias"): "b_enc",
    ("dec", "weight"): "W_dec",
    ("dec", "bias"): "b_dec",
}


def recognises(path: Path) -> bool:
    """A folder whose ``config.json`` counts the features of adapters."""
    file = path / CONFIG_NAME
    if not file.is_file():
        return False
    try:
        config = read_json(file)
    except ValueError:
        return False
    return isinstance(config, dict) and "transcoder_n_features" in config


def read(path: Path) -> tuple[list[io.Loader], list[Site], dict[str, Any]]:
    """Reads the headers of all weight files; the adapters' weights are read by the returned loaders.

    Raises:
        ValueError: no adapters in the files, a layer without one, or tensors missing or of the wrong shape.
    """
    places: dict[int, dict[str, tuple[Path, str]]] = {}
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for key, shape in shapes_of(file).items():
            if match := _TENSOR.fullmatch(key):
                layer, name = int(match[1]), _CANONICAL[match[2], match[3]]
                places.setdefault(layer, {})[name] = (file, key)
                shapes.setdefault(layer, {})[name] = shape[::-1] if name == "W_dec" else shape
    if not places:
        raise ValueError(f"{path}: expected tensors named ...mlp.transcoder_enc.weight, found none")
    if missing := sorted(set(range(max(places) + 1)) - places.keys()):
        raise ValueError(f"{path}: expected adapters in layers 0 to {max(places)}, missing {missing}")
    layers = range(len(places))
    configs = [_config(path, layer, shapes[layer]) for layer in layers]
    loaders = [
        lambda layer=layer, config=config: _load(path, layer, places[layer], config)
        for layer, config in zip(layers, configs, strict=True)
    ]
    metadata = {"format": FORMAT.name, "architectures": read_json(path / CONFIG_NAME).get("architectures")}
    return loaders, [Site(layer, "mlp_in", "mlp_out") for layer in layers], metadata


FORMAT = Format("transcoder-adapter", recognises, read, "adapters")


def _config(path: Path, layer: int, shapes: dict[str, tuple[int, ...]]) -> TranscoderConfig:
    where = f"{path}: layer {layer}"
    if missing := sorted({"W_enc", "b_enc", "W_dec"} - shapes.keys()):
        raise ValueError(f"{where}: missing tensors {missing}, found {sorted(shapes)}")
    if len(shapes["W_enc"]) != 2 or len(shapes["W_dec"]) != 2:
        raise ValueError(f"{where}: expected matrices, got W_enc {shapes['W_enc']}, W_dec {shapes['W_dec']}")
    (n_features, d_in), d_out = shapes["W_enc"], shapes["W_dec"][1]
    config = TranscoderConfig(d_in, n_features, d_out, "relu")
    io.check_shapes(config, {"b_dec": (d_out,), **shapes}, where)
    return config


def _load(
    path: Path, layer: int, places: dict[str, tuple[Path, str]], config: TranscoderConfig
) -> Transcoder:
    tensors = {name: io.read_tensor(file, key) for name, (file, key) in places.items()}
    tensors["W_dec"] = tensors["W_dec"].T.contiguous()
    tensors.setdefault("b_dec", torch.zeros(config.d_out, dtype=tensors["W_dec"].dtype))
    return io.build(config, tensors, f"{path}: layer {layer}", TranscoderAdapter)
