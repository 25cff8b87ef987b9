"""Feature files as the page reads them."""

import json

import pytest

from fasttc.report import FeatureFolder

from .conftest import feature_file


@pytest.mark.parametrize("below", ["", "some-model"])
def test_files_in_the_folder_or_one_below(write_features, below):
    folder = FeatureFolder(write_features([(1, 7)], below=below))
    found = folder.find(1, 7)
    assert found["top"] == ["fever", "hip"]
    assert found["bottom"] == ["the"]
    assert found["embeddings"] == ["hot"]
    assert found["frequency"] == 0.012
    assert found["range"] == [0.1, 2.0]
    assert [len(group["examples"]) for group in found["groups"]] == [5, 2]
    assert found["groups"][0]["examples"][0]["acts"] == [0.0, 0.5, 2.0]
    assert folder.find(1, 8) is None


def test_long_examples_are_cut_around_their_peak(write_features):
    path = write_features([(0, 0)])
    content = feature_file()
    acts = [0.0] * 200
    acts[150] = 3.0
    content["examples_quantiles"][0]["examples"] = [
        {"tokens": [str(at) for at in range(200)], "tokens_acts_list": acts}
    ]
    (path / "0.json").write_text(json.dumps(content))
    example = FeatureFolder(path).find(0, 0)["groups"][0]["examples"][0]
    assert len(example["tokens"]) == len(example["acts"]) == 64
    assert example["acts"][example["tokens"].index("150")] == 3.0


def test_a_file_with_the_least_is_enough(write_features):
    path = write_features([(0, 0)])
    (path / "0.json").write_text("{}")
    found = FeatureFolder(path).find(0, 0)
    assert found == {
        "top": [], "bottom": [], "embeddings": [], "groups": [], "histogram": [], "range": [0.0, 0.0], "frequency": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["[]", '{"examples_quantiles": [{"examples": [{"tokens": ["a"], "tokens_acts_list": []}]}]}', "{"],
)
def test_broken_files_are_named(write_features, content):
    path = write_features([(0, 0)])
    (path / "0.json").write_text(content)
    with pytest.raises(ValueError, match=r"0\.json"):
        FeatureFolder(path).find(0, 0)


def test_folders_that_hold_none(tmp_path, write_features):
    with pytest.raises(
        ValueError, match=r"features: expected a folder of feature files, .*absent is not a folder"
    ):
        FeatureFolder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"features: expected feature files in .*, got none"):
        FeatureFolder(tmp_path / "empty")
    path = write_features([(0, 0)], below="a")
    write_features([(0, 0)], below="b")
    with pytest.raises(ValueError, match="got a, b"):
        FeatureFolder(path)
    assert FeatureFolder(path, scan="b").find(0, 0) is not None
