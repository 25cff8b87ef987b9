"""Default and bound sites, and whether a transcoder set fits a model."""

import pytest

from fasttc.models import bind_sites, check_match, default_sites
from fasttc.nn import Site, Transcoder, TranscoderSet


def test_default_sites(tiny_model, family):
    model = tiny_model(family)
    sites = default_sites(model)
    expected = {"gemma2": ("normalized", "mlp_out_post"), "gemma3": ("mlp_in", "mlp_out_post")}
    assert [(site.x, site.y) for site in sites] == [expected.get(family, ("mlp_in", "mlp_out"))] * 3
    assert [site.layer for site in sites] == [0, 1, 2]
    assert sites == bind_sites(model, sites)
    for site in sites:
        model.get_submodule(site.read)
        writes = "post_feedforward_layernorm" if family.startswith("gemma") else "mlp"
        assert site.write.endswith(f".{site.layer}.{writes}")


def test_binding_replaces_the_paths_of_another_model(tiny_model):
    foreign = default_sites(tiny_model("gpt2"))
    bound = bind_sites(tiny_model("gemma2"), foreign)
    assert (bound[2].read, bound[2].write) == (
        "model.layers.2.pre_feedforward_layernorm",
        "model.layers.2.mlp",
    )
    assert (bound[2].x, bound[2].y) == ("mlp_in", "mlp_out")
    no_post_norm = bind_sites(tiny_model("llama"), [Site(1, "resid_mid", "mlp_out_post", zero_positions=4)])
    assert (no_post_norm[0].write, no_post_norm[0].zero_positions) == ("model.layers.1.mlp", 4)


def test_binding_checks_the_layer(tiny_model):
    with pytest.raises(ValueError, match=r"expected a layer of the model \(0 to 2\), got layer 3"):
        bind_sites(tiny_model("llama"), [Site(0), Site(3)])


def test_check_match(tiny_model, transcoders):
    model = tiny_model("llama")

    def subset(*layers):
        return transcoders(model, [Site(layer) for layer in layers])

    check_match(model, subset(0, 1, 2))
    check_match(model, subset(1), layers=[1])
    check_match(model, subset(0, 1, 2), layers=[2, 0])
    with pytest.raises(
        ValueError,
        match=r"expected layers 0 to 2 of the model \(3\), got layers 0 to 1 \(2\); name the layers",
    ):
        check_match(model, subset(0, 1))
    with pytest.raises(
        ValueError, match=r"expected layers 0 to 2 of the model \(3\), got layers 0 to 3 \(4\)$"
    ):
        check_match(model, subset(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"expected layers of the transcoder set \(0, 2\), got \[1\]"):
        check_match(model, subset(0, 2), layers=[1])
    with pytest.raises(ValueError, match=r"expected layers of the model \(0 to 2\), got \[3\]"):
        check_match(model, subset(0, 3), layers=[3])


@pytest.mark.parametrize(
    ("d_in", "d_out", "message"), [(16, 32, "input width 32"), (32, 24, "output width 32")]
)
def test_check_match_names_both_widths(tiny_model, d_in, d_out, message):
    tcs = TranscoderSet(
        [Transcoder(*((d_in, 8, d_out) if layer == 1 else (32, 8)), k=2) for layer in range(3)],
        [Site(layer) for layer in range(3)],
    )
    got = d_in if "input" in message else d_out
    with pytest.raises(
        ValueError, match=rf"transcoder of layer 1: expected {message} \(the model's\), got {got}"
    ):
        check_match(tiny_model("qwen2"), tcs)
