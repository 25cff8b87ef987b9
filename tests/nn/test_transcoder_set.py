"""TranscoderSet on disk: whole or absent, lazy, and refused with one clear line when broken."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttc.nn import Site, Transcoder, TranscoderSet, io
from fasttc.testing import assert_same_bits, draw

LAYERS = (0, 2, 5)


def make(activation="topk", skip=False, dtype=torch.float32, seed=0) -> TranscoderSet:
    torch.manual_seed(seed)
    tcs = [Transcoder(6, 16, 4, activation, 3, skip, dtype=dtype) for _ in LAYERS]
    sites = [Site(layer, "normalized", "mlp_out_post", "a.b", "c.d", 4) for layer in LAYERS]
    return TranscoderSet(tcs, sites, {"model": "tiny", "seed": seed})


@pytest.fixture
def saved(tmp_path) -> Path:
    make().save_pretrained(tmp_path / "set")
    return tmp_path / "set"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_layer(folder: Path, change) -> None:
    file = folder / io.layer_file(2)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_header(folder: Path, change) -> None:
    header = json.loads((folder / io.CONFIG_NAME).read_text())
    change(header)
    (folder / io.CONFIG_NAME).write_text(json.dumps(header))


# --- round trip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_round_trip_keeps_every_bit(tmp_path, activation, skip, dtype):
    tcs = make(activation, skip, dtype)
    if activation == "batchtopk":
        for tc in tcs:
            tc.threshold.fill_(0.25)
    tcs.save_pretrained(tmp_path / "set")
    again = TranscoderSet.from_pretrained(tmp_path / "set")
    assert len(again) == 3
    assert again.layers == list(LAYERS)
    assert again.sites == tcs.sites
    assert again.metadata == tcs.metadata
    x = draw("normal", 5, 6, dtype=dtype)
    for before, after in zip(tcs, again, strict=True):
        assert after.config == before.config
        assert before.state_dict().keys() == after.state_dict().keys()
        for name, tensor in before.state_dict().items():
            assert_same_bits(after.state_dict()[name], tensor, name=name)
        assert not after.training
        assert all(parameter.requires_grad for parameter in after.parameters())
        assert_same_bits(after(x), before.eval()(x))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        make().save_pretrained(tmp_path / name)
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_a_lazily_read_set_can_be_saved_over_itself(saved):
    before = content(saved)
    TranscoderSet.from_pretrained(saved).save_pretrained(saved)
    assert content(saved) == before


def test_a_smaller_set_leaves_nothing_of_the_larger_one(saved):
    tcs = make()
    TranscoderSet([tcs[0]], [Site(1)]).save_pretrained(saved)
    assert set(content(saved)) == {io.CONFIG_NAME, io.layer_file(1)}


# --- lazy ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    seen, read = [], io.read_tensors

    def watched(file):
        seen.append(file.name)
        return read(file)

    monkeypatch.setattr(io, "read_tensors", watched)
    return seen


def test_weights_are_read_on_first_use_and_once(saved, reads):
    tcs = TranscoderSet.from_pretrained(saved)
    assert (len(tcs), tcs.layers, tcs.sites[1].read) == (3, list(LAYERS), "a.b")
    assert reads == []
    first = tcs[1]
    assert tcs[1] is first
    assert reads == ["layer_2.safetensors"]
    list(tcs)
    assert reads == ["layer_2.safetensors", "layer_0.safetensors", "layer_5.safetensors"]


def test_eager_reading(saved, reads):
    TranscoderSet.from_pretrained(saved, lazy=False)
    assert reads == [io.layer_file(layer) for layer in LAYERS]


def test_dtype_holds_for_layers_read_before_and_after(saved):
    assert TranscoderSet.from_pretrained(saved, dtype=torch.float64)[2].W_dec.dtype == torch.float64
    tcs = TranscoderSet.from_pretrained(saved)
    early = tcs[0]
    assert tcs.to(dtype=torch.bfloat16) is tcs
    assert early.W_enc.dtype == tcs[2].W_enc.dtype == torch.bfloat16
    assert tcs.to(device="meta")[1].W_enc.is_meta


# --- atomic ----------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Lets one file be written, a second one in part, and then fails."""

    def fill(error: BaseException) -> None:
        real, count = io.save_file, iter(range(10))

        def failing(tensors, file):
            if next(count) == 0:
                real(tensors, file)
                return
            Path(file).write_bytes(b"half")
            raise error

        monkeypatch.setattr(io, "save_file", failing)

    return fill


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_failed_save_leaves_the_old_set_untouched(saved, full_disk, error):
    before = content(saved)
    full_disk(error)
    with pytest.raises(type(error)):
        make(seed=1).save_pretrained(saved)
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["set"]


def test_a_failed_first_save_leaves_nothing(tmp_path, full_disk):
    full_disk(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        make().save_pretrained(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_not_overwritten(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder to write to, got the file"):
        make().save_pretrained(tmp_path / "set")
    assert (tmp_path / "set").read_text() == "mine"


# --- broken ----------------------------------------------------------------------------------------------------


def _put(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


BROKEN_LAYER = [
    (lambda t: t.pop("b_dec"), r"layer_2.*: missing tensors \['b_dec'\], unexpected tensors \[\]"),
    (lambda t: t.pop("W_enc"), r"layer_2.*: missing tensors \['W_enc'\], unexpected tensors \[\]"),
    (
        lambda t: t.update(W_skip=torch.ones(4, 6)),
        r"layer_2.*: missing tensors \[\], unexpected tensors \['W_skip'\]",
    ),
    (
        lambda t: t.update(W_dec=torch.ones(4, 16)),
        r"layer_2.*: W_dec expected shape \[16, 4\], got \[4, 16\]",
    ),
    (
        lambda t: t.update(b_enc=torch.ones(16).int()),
        r"layer_2.*: b_enc expected a float tensor, got torch\.int32",
    ),
    (_put("W_enc", float("nan")), r"layer_2.*: W_enc expected finite numbers, it holds NaN or infinity"),
    (_put("b_dec", float("-inf")), r"layer_2.*: b_dec expected finite numbers"),
]


@pytest.mark.parametrize(("change", "match"), BROKEN_LAYER, ids=[match[9:40] for _, match in BROKEN_LAYER])
def test_broken_layers_are_named(saved, change, match):
    edit_layer(saved, change)
    tcs = TranscoderSet.from_pretrained(saved)
    tcs[0]
    with pytest.raises(ValueError, match=match):
        tcs[1]
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(saved, lazy=False)


def _layer(**fields):
    return lambda header: header["layers"][1].update(fields)


def _config(**fields):
    return lambda header: header["layers"][1]["config"].update(fields)


BROKEN_HEADER = [
    (_config(k=17), "k: expected 1 <= k <= n_features = 16, got 17"),
    (_config(activation="gelu"), "activation: expected one of topk"),
    (_config(depth=3), "transcoder configuration: expected the fields"),
    (_layer(site={"layer": 2, "x": "attention"}), "Site.x: expected one of mlp_in"),
    (_layer(site={"layer": 7}), r"sites: expected ascending layers without repetition, got \[0, 7, 5\]"),
    (lambda h: h["layers"][1].pop("file"), "layer 1: expected file, site and config, got"),
    (lambda h: h.update(layers=[]), "transcoders: expected at least one, got an empty set"),
    (lambda h: h.update(format="other"), "expected a fasttc transcoder set, .* describes something else"),
    (lambda h: h.update(schema_version=99), "expected schema version 1, got 99; update fasttc to read it"),
]


@pytest.mark.parametrize(("change", "match"), BROKEN_HEADER, ids=[match[:40] for _, match in BROKEN_HEADER])
def test_broken_headers_are_named(saved, change, match):
    edit_header(saved, change)
    with pytest.raises(ValueError, match=match):
        TranscoderSet.from_pretrained(saved)


def test_damaged_files_are_named(saved, tmp_path):
    (saved / io.layer_file(2)).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"expected a safetensors file, cannot read .*layer_2"):
        TranscoderSet.from_pretrained(saved)[1]
    (saved / io.layer_file(2)).unlink()
    with pytest.raises(ValueError, match=r"expected a safetensors file, cannot read .*layer_2"):
        TranscoderSet.from_pretrained(saved)[1]
    (saved / io.CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"expected a JSON file, .*fasttc\.json is not one"):
        TranscoderSet.from_pretrained(saved)
    (saved / io.CONFIG_NAME).unlink()
    with pytest.raises(ValueError, match="does not exist or is a file"):
        TranscoderSet.from_pretrained(tmp_path / "absent")


def test_construction_is_checked():
    tcs = list(make())
    with pytest.raises(ValueError, match=r"sites: expected one per transcoder \(3\), got 1"):
        TranscoderSet(tcs, [Site(0)])
    with pytest.raises(ValueError, match="expected at least one, got an empty set"):
        TranscoderSet([], [])
    with pytest.raises(ValueError, match=r"expected ascending layers without repetition, got \[0, 1, 1\]"):
        TranscoderSet(tcs, [Site(0), Site(1), Site(1)])


def test_repr_says_what_it_is():
    assert repr(make()) == "TranscoderSet(3 layers 0..5, normalized -> mlp_out_post)"
