"""circuit-tracer sets: golden files written by that library, and every way in which such a folder can be broken."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fasttc import formats, models
from fasttc.formats import TranscoderSet
from fasttc.testing import assert_within_budget, draw, draw_coder

SETTINGS = {
    "model_kind": "transcoder_set",
    "model_name": "tiny",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}
GOLDEN = {  # folder -> activation, k, skip
    "ct_relu": ("relu", None, False),
    "ct_relu_skip": ("relu", None, True),
    "ct_jumprelu": ("jumprelu", None, False),
    "ct_topk": ("topk", 4, False),
}


def tensors(layer: int = 0, f: int = 12, d: int = 5) -> dict[str, torch.Tensor]:
    return draw_coder(f, d, seed=layer)


@pytest.fixture
def written(tmp_path):
    """Writes a set; ``change`` edits the tensors of layer 1, ``settings`` replaces config.yaml (None leaves it out)."""

    def write(n_layers: int = 3, change=None, settings: dict | str | None = SETTINGS, each=None) -> Path:
        for layer in range(n_layers):
            content = tensors(layer)
            if each is not None:
                each(content)
            if change is not None and layer == 1:
                change(content)
            save_file(content, tmp_path / f"layer_{layer}.safetensors")
        if settings is not None:
            text = settings if isinstance(settings, str) else yaml.safe_dump(settings)
            (tmp_path / "config.yaml").write_text(text)
        return tmp_path

    return write


# --- golden ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_equal_those_of_the_library(shared_data, name):
    folder = shared_data / "formats" / name
    assert formats.sniff(folder) == "circuit-tracer"
    tcs, golden = TranscoderSet.from_pretrained(folder), load_file(folder / "io.safetensors")
    assert len(tcs) == len(golden["x"])
    for layer, tc in enumerate(tcs):
        assert (tc.activation, tc.k, tc.skip) == GOLDEN[name]
        acts = tc.encode(golden["x"][layer])
        dense = acts.to_dense()
        assert torch.equal(dense != 0, golden["acts"][layer] != 0)
        exact = TranscoderSet.from_pretrained(folder, dtype=torch.float64)[layer]
        x64 = golden["x"][layer].double()
        assert_within_budget(dense, exact.encode(x64).to_dense(), golden["acts"][layer], name="activations")
        assert_within_budget(tc(golden["x"][layer]), exact(x64), golden["y"][layer], name="outputs")


def test_topk_passes_no_relu(shared_data):
    """The library multiplies by a mask, so what is left out of a negative row shows as -0 in its reference output."""
    golden = load_file(shared_data / "formats" / "ct_topk" / "io.safetensors")
    assert bool(golden["acts"][golden["acts"] == 0].signbit().any())
    tc = TranscoderSet.from_pretrained(shared_data / "formats" / "ct_topk")[0]
    with torch.no_grad():
        tc.b_enc.fill_(-100.0)
    assert bool((tc.encode(golden["x"][0]).values < -50).all())


@pytest.mark.parametrize(
    ("case", "x", "y", "activation", "k"),
    [
        ("gemma2_jumprelu", "normalized", "mlp_out_post", "jumprelu", None),
        ("llama_topk_skip", "mlp_in", "mlp_out", "topk", 12),
    ],
)
def test_oracle_sets(shared_data, case, x, y, activation, k):
    tcs = TranscoderSet.from_pretrained(shared_data / "oracle" / case / "transcoders")
    assert [(site.layer, site.x, site.y, site.zero_positions) for site in tcs.sites] == [
        (layer, x, y, 1) for layer in range(3)
    ]
    assert {(tc.activation, tc.k, tc.skip) for tc in tcs} == {(activation, k, case.endswith("skip"))}
    assert tcs.metadata["format"] == "circuit-tracer"


@pytest.mark.parametrize("case", ["gemma2_jumprelu", "llama_topk_skip"])
def test_the_library_found_the_same_active_features_in_a_model(shared_data, case):
    folder = shared_data / "oracle" / case
    tcs = TranscoderSet.from_pretrained(folder / "transcoders", dtype=torch.float64)
    model, _ = models.load(folder / "hf_model", dtype=torch.float64)
    graph = load_file(folder / "ct_graph_f64.safetensors")
    with models.float64_exact(model), models.capture(model, tcs.sites) as record, torch.no_grad():
        model(graph["input_tokens"][None])
        found = [tc.encode(x[0]).active() for tc, x in zip(tcs, record.x, strict=True)]
    rows = [
        torch.stack([torch.full_like(token, layer), token, feature], dim=1)
        for layer, (token, feature, _) in enumerate(found)
    ]
    kept = [row[:, 1] > 0 for row in rows]  # circuit-tracer zeroes position 0
    assert torch.equal(
        torch.cat([row[k] for row, k in zip(rows, kept, strict=True)]), graph["active_features"]
    )
    values = torch.cat([value[k] for (_, _, value), k in zip(found, kept, strict=True)])
    torch.testing.assert_close(values, graph["activation_values"], rtol=0, atol=1e-9)


# --- what a folder may look like -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "expected"),
    [("mlp.hook_in", "mlp_in"), ("ln2.hook_normalized", "normalized"), ("hook_resid_mid", "resid_mid")],
)
def test_input_hooks(written, hook, expected):
    tcs = TranscoderSet.from_pretrained(written(settings={**SETTINGS, "feature_input_hook": hook}))
    assert [site.x for site in tcs.sites] == [expected] * 3


@pytest.mark.parametrize(
    ("hook", "expected"), [("mlp.hook_out", "mlp_out"), ("hook_mlp_out", "mlp_out_post")]
)
def test_output_hooks(written, hook, expected):
    tcs = TranscoderSet.from_pretrained(written(settings={**SETTINGS, "feature_output_hook": hook}))
    assert [site.y for site in tcs.sites] == [expected] * 3


@pytest.mark.parametrize(
    ("model", "expected"),
    [("google/gemma-3-1b-it", 4), ("google/gemma-3-1b-pt", 1), ("google/gemma-2-2b-it", 1)],
)
def test_instruction_tuned_gemma_3_zeroes_four_positions(written, model, expected):
    tcs = TranscoderSet.from_pretrained(written(settings={**SETTINGS, "model_name": model}))
    assert {site.zero_positions for site in tcs.sites} == {expected}


@pytest.mark.parametrize("source", ["yaml", "tensor", "both"])
def test_k_in_the_settings_or_as_a_tensor(written, source):
    settings = {**SETTINGS, **({} if source == "tensor" else {"activation": "topk", "k": 3})}

    def each(content):
        if source != "yaml":
            content["k"] = torch.tensor(3)

    tcs = TranscoderSet.from_pretrained(written(settings=settings, each=each))
    assert {(tc.activation, tc.k, tc.config.relu) for tc in tcs} == {("topk", 3, False)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_file_is_kept_unless_another_is_asked_for(written, dtype):
    def each(content):
        content.update({name: tensor.to(dtype) for name, tensor in content.items()})

    folder = written(each=each)
    assert TranscoderSet.from_pretrained(folder)[0].W_enc.dtype == dtype
    assert TranscoderSet.from_pretrained(folder, dtype=torch.float32)[0].W_enc.dtype == torch.float32


def test_layers_are_read_one_by_one(written):
    folder = written()
    tcs = TranscoderSet.from_pretrained(folder)
    expected = tensors(0)
    (folder / "layer_2.safetensors").unlink()
    assert torch.equal(tcs[0].W_enc, expected["W_enc"])
    with pytest.raises(ValueError, match=r"cannot read .*layer_2\.safetensors"):
        tcs[2]


def test_more_than_ten_layers_come_in_numeric_order(written):
    tcs = TranscoderSet.from_pretrained(written(n_layers=12))
    assert tcs.layers == list(range(12))
    assert torch.equal(tcs[10].W_enc, tensors(10)["W_enc"])
    assert torch.equal(tcs[2].W_enc, tensors(2)["W_enc"])


def test_other_files_do_not_disturb(written):
    folder = written()
    (folder / "features").mkdir()
    (folder / "layer_notes.safetensors").write_bytes(b"")
    assert len(TranscoderSet.from_pretrained(folder)) == 3


def test_without_settings_the_mlp_itself_is_assumed_and_said(written):
    folder = written(settings=None)
    with pytest.warns(
        UserWarning,
        match=r"no config\.yaml: assuming that it reads mlp\.hook_in and writes mlp\.hook_out",
    ):
        tcs = TranscoderSet.from_pretrained(folder)
    assert (tcs.sites[0].x, tcs.sites[0].y) == ("mlp_in", "mlp_out")


def test_read_sets_save_natively_with_dates_and_all(written, tmp_path_factory):
    folder = written(settings="model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: "
                              "hook_mlp_out\ncreated: 2025-05-29\n")  # fmt: skip
    copy = tmp_path_factory.mktemp("native") / "set"
    tcs = TranscoderSet.from_pretrained(folder)
    tcs.save_pretrained(copy)
    assert formats.sniff(copy) == "fasttc"
    again = TranscoderSet.from_pretrained(copy)
    assert again.sites == tcs.sites
    assert (
        again.metadata
        == tcs.metadata
        == {**tcs.metadata, "created": "2025-05-29", "format": "circuit-tracer"}
    )
    x = draw("normal", 4, 5)
    for a, b in zip(again, tcs, strict=True):
        assert torch.equal(a(x), b(x))


# --- what it may not -------------------------------------------------------------------------------------------


def _nan(content):
    content["W_dec"][3, 2] = float("nan")


BROKEN_LAYER = {
    "missing": (lambda c: c.pop("b_dec"), r"layer_1.*: missing tensors \['b_dec'\], unexpected tensors \[\]"),
    "missing W_enc": (lambda c: c.pop("W_enc"), r"layer_1.*: missing tensors \['W_enc'\]"),
    "extra": (lambda c: c.update(W_up=torch.ones(2)), r"layer_1.*: .* unexpected tensors \['W_up'\]"),
    "shape": (lambda c: c.update(b_enc=torch.ones(13)), r"layer_1.*: b_enc expected shape \[12\], got \[13\]"),
    "rank": (lambda c: c.update(W_enc=torch.ones(12)), r"layer_1.*: W_enc expected shape \[F, D\], got \[12\]"),
    "transposed": (
        lambda c: c.update(W_enc=c["W_enc"].T.contiguous()),
        r"layer_1.*: W_dec expected shape \[5, 5\], got \[12, 5\]"
    ),
    "wider": (lambda c: c.update(tensors(f=13)), "layer 1: expected n_features 12 as in layer 0, got 13"),
    "other model": (lambda c: c.update(tensors(d=6)), "layer 1: expected d_in 5 as in layer 0, got 6"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_LAYER)
def test_headers_are_checked_before_any_weight_is_read(written, case):
    change, match = BROKEN_LAYER[case]
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(written(change=change))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_nan, r"layer_1.*: W_dec expected finite numbers, it holds NaN or infinity"),
        (lambda c: c["b_enc"].fill_(float("inf")), r"b_enc expected finite numbers"),
        (lambda c: c.update(b_dec=torch.ones(5).int()), r"b_dec expected a float tensor, got torch\.int32"),
    ],
    ids=["nan", "inf", "integers"],
)
def test_contents_are_checked_when_a_layer_is_read(written, change, match):
    folder = written(change=change)
    tcs = TranscoderSet.from_pretrained(folder)
    tcs[0]
    with pytest.raises(ValueError, match=match):
        tcs[1]
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(folder, lazy=False)


BROKEN_SETTINGS = {
    "cross-layer": (
        {"model_kind": "cross_layer_transcoder"},
        "model_kind: expected transcoder_set, got 'cross_layer",
    ),
    "input hook": (
        {"feature_input_hook": "hook_z"},
        "feature_input_hook: expected one of .* got 'hook_z'",
    ),
    "output hook": (
        {"feature_output_hook": None},
        "feature_output_hook: expected one of mlp.hook_out, .* got None",
    ),
    "activation": ({"activation": "gelu"}, "activation: expected relu, jumprelu or topk, got 'gelu'"),
    "no k": ({"activation": "topk"}, "k: expected a positive int for activation 'topk', got None"),
    "k over F": ({"activation": "topk", "k": 13}, "k: expected 1 <= k <= n_features = 12, got 13"),
    "no threshold": ({"activation": "jumprelu"}, r"missing tensors \['threshold'\]"),
}


@pytest.mark.parametrize("case", BROKEN_SETTINGS)
def test_bad_settings_are_named(written, case):
    change, match = BROKEN_SETTINGS[case]
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(written(settings={**SETTINGS, **change}))


def test_settings_and_tensor_must_agree_on_k(written):
    def change(content):
        content["k"] = torch.tensor(4)

    folder = written(change=change, settings={**SETTINGS, "activation": "topk", "k": 3})
    with pytest.raises(ValueError, match=r"layer_1.*expected k = 3 as in config\.yaml, got the tensor k = 4"):
        TranscoderSet.from_pretrained(folder)


def test_k_must_be_one_integer(written):
    def each(content):
        content["k"] = torch.ones(2)

    with pytest.raises(ValueError, match=r"k expected one integer, got torch\.float32 \[2\]"):
        TranscoderSet.from_pretrained(written(each=each))


@pytest.mark.parametrize(
    ("text", "match"), [("a: [1", "expected a YAML file"), ("- 1\n", "expected settings by name, got list")]
)
def test_damaged_settings(written, text, match):
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(written(settings=text))


@pytest.mark.parametrize("gone", [0, 1])
def test_a_gap_in_the_layers_is_named(written, gone):
    folder = written()
    (folder / f"layer_{gone}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"expected layers 0 to 2, missing \[{gone}\]"):
        TranscoderSet.from_pretrained(folder)


def test_settings_without_layers(written):
    with pytest.raises(
        ValueError, match=r"expected layer_0\.safetensors and so on beside config\.yaml, found none"
    ):
        TranscoderSet.from_pretrained(written(n_layers=0))


def test_damaged_layer(written):
    folder = written()
    (folder / "layer_1.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"expected a safetensors file, cannot read .*layer_1"):
        TranscoderSet.from_pretrained(folder)


def test_what_is_no_checkpoint(tmp_path, shared_data):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    for path, match in (
        (empty, "empty is in no known format; known: fasttc, circuit-tracer"),
        (file, "expected a folder, .*file does not exist or is a file"),
        (tmp_path / "absent", "expected a folder, .*absent does not exist"),
        (shared_data / "oracle" / "llama_topk_skip" / "hf_model", "is in no known format"),
    ):
        with pytest.raises(ValueError, match=match):
            TranscoderSet.from_pretrained(path)
        with pytest.raises(ValueError, match=match):
            formats.sniff(path)


def test_foreign_settings_alone_are_not_taken_for_ours(tmp_path, shared_data):
    (tmp_path / "config.yaml").write_text("class_path: other.Model\n")
    with pytest.raises(ValueError, match="in no known format"):
        formats.sniff(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="in no known format"):
        formats.sniff(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(shared_data / "formats" / "ct_relu", copy)
    assert formats.sniff(copy) == "circuit-tracer"
