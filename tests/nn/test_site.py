"""Site and hub references: data that is checked when it is made."""

import pytest

from fasttc.nn import Site, hub


def test_round_trip_and_defaults():
    site = Site(3, "normalized", "mlp_out_post", "model.norm", "model.mlp", 4)
    assert Site.from_dict(site.to_dict()) == site
    assert Site(0) == Site(0, "mlp_in", "mlp_out", "", "", 1)
    assert hash(Site(0)) == hash(Site(0))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"layer": 0, "x": "mlp_out"},
            "Site.x: expected one of mlp_in, normalized, resid_mid, got 'mlp_out'",
        ),
        ({"layer": 0, "y": "mlp_in"}, "Site.y: expected one of mlp_out, mlp_out_post, got 'mlp_in'"),
        ({"layer": -1}, "expected layer >= 0 and zero_positions >= 0, got Site"),
        ({"layer": 0, "zero_positions": -1}, "expected layer >= 0 and zero_positions >= 0"),
        ({"layer": 0, "place": 1}, r"Site: expected the fields \['layer', .*got \{'layer': 0, 'place': 1\}"),
        ({"layer": "0"}, r"Site: expected the fields"),
        ({}, "Site: expected the fields"),
    ],
)
def test_bad_fields_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        Site.from_dict(fields)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Stands in for the hub; returns what it was asked for."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, revision=None, allow_patterns=None):
        asked.append((repo, revision, allow_patterns))
        if repo == "user/absent":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("reference", "asked", "inside"),
    [
        ("user/repo", ("user/repo", None, None), ""),
        ("user/repo@v1", ("user/repo", "v1", None), ""),
        ("user/repo/sub/folder@v1", ("user/repo", "v1", "sub/folder/*"), "sub/folder"),
        ("hf://user/repo", ("user/repo", None, None), ""),
    ],
)
def test_hub_references(downloads, tmp_path, reference, asked, inside):
    assert hub.resolve(reference) == tmp_path / inside
    assert downloads == [asked]


@pytest.mark.parametrize(
    "reference", ["absent", "./a/b", "/a/b", "~/absent-folder-of-nobody/b", "a//b", "a/"]
)
def test_what_cannot_be_a_hub_reference_stays_a_path(downloads, reference):
    hub.resolve(reference)
    assert downloads == []


def test_an_existing_folder_wins_over_the_hub(downloads, tmp_path, monkeypatch):
    (tmp_path / "user" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("user/repo").is_dir()
    assert downloads == []


def test_what_the_hub_does_not_have_is_said(downloads):
    with pytest.raises(
        ValueError, match=r"user/absent: no such folder here, and the hub could not provide it \(404\)"
    ):
        hub.resolve("user/absent")
