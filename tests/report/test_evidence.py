"""Feature files as the page reads them, plain and packed."""

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from fasttc.report import FeatureFolder
from fasttc.report import packed as packed_module

from .conftest import feature_file


def write_packed(
    folder: Path, records: list[bytes], as_object: bool = False, name: str = "layer_0.bin"
) -> Path:
    """Packed files of one layer, by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets = [0]
    for record in records:
        offsets.append(offsets[-1] + len(record))
    (folder / "layer_0.bin").write_bytes(b"".join(records))
    entry: Any = {"filename": name, "offsets": offsets}
    index = json.dumps({"0": entry} if as_object else [entry])
    (folder / "index.json.gz").write_bytes(gzip.compress(index.encode()))
    return folder


def record(content: Any, compress: Any = zlib.compress) -> bytes:
    data = compress(json.dumps(content).encode())
    return struct.pack("<I", len(data)) + data


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


def test_a_feature_of_another_owner_is_another_feature(write_features):
    unmarked, adapter = write_features([(1, 7)]), write_features([(1, 7)], name="a", owner="adapter")
    assert FeatureFolder(unmarked).find(1, 7, "adapter") is None
    assert FeatureFolder(adapter).find(1, 7) is None
    assert FeatureFolder(adapter).find(1, 7, "adapter") == FeatureFolder(unmarked).find(1, 7)


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


@pytest.mark.parametrize("as_object", [False, True], ids=["list", "object"])
@pytest.mark.parametrize("compress", [zlib.compress, gzip.compress])
def test_packed_files_say_the_same_as_plain_ones(tmp_path, write_features, as_object, compress):
    plain = FeatureFolder(write_features([(0, 2)])).find(0, 2)
    records = [b"", b"", record(feature_file(), compress), b""]
    folder = FeatureFolder(write_packed(tmp_path / "packed" / "below", records, as_object).parent)
    assert folder.path.name == "below"
    assert folder.find(0, 2) == plain
    assert [folder.find(layer, index) for layer, index in ((0, 1), (0, 3), (0, 9), (1, 2))] == [None] * 4


def test_what_features_writes_packed_is_read(tmp_path):
    from fasttc.report.feature_files import write_packed as write

    from .test_feature_files import NAMES, _evidence

    found = [_evidence(0, 4), _evidence(2, 3)]
    folder = FeatureFolder(write(tmp_path / "packed", "set", found, NAMES, n_features=5))
    assert folder.find(2, 3) == folder.find(0, 4)
    assert folder.find(2, 3)["top"] == ["</script>"]
    assert folder.find(1, 3) is None


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([b"ab"], r"layer_0\.bin.*feature 0/0"),
        ([struct.pack("<I", 9) + b"123"], "expected a record of 9 bytes, got 3"),
        ([struct.pack("<I", 4) + b"1234"], "feature 0/0, got a broken one"),
        ([record(feature_file())[:-9] + b"x"], "got a broken one"),
        ([record([])], r"index\.json\.gz: expected a feature file, got a broken one for 0/0"),
    ],
)
def test_broken_records_are_named(tmp_path, records, message):
    folder = FeatureFolder(write_packed(tmp_path, records))
    with pytest.raises(ValueError, match=message):
        folder.find(0, 0)


def test_a_record_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_module, "_MOST_BYTES", 5000)
    folder = FeatureFolder(write_packed(tmp_path, [record("a" * 9000), record(feature_file())]))
    with pytest.raises(ValueError, match="at most 5,000 bytes"):
        folder.find(0, 0)
    assert folder.find(0, 1) is not None
    (tmp_path / "index.json.gz").write_bytes(gzip.compress(b" " * 9000 + b"[]"))
    with pytest.raises(ValueError, match=r"index\.json\.gz: .*at most 5,000 bytes"):
        FeatureFolder(tmp_path)


def test_json_nested_without_end_is_refused(tmp_path):
    nested = b"[" * 100_000
    packed = zlib.compress(nested)
    folder = FeatureFolder(write_packed(tmp_path, [struct.pack("<I", len(packed)) + packed]))
    with pytest.raises(ValueError, match="feature 0/0, got a broken one"):
        folder.find(0, 0)
    (tmp_path / "index.json.gz").write_bytes(gzip.compress(nested))
    with pytest.raises(ValueError, match="expected an index of packed feature files"):
        FeatureFolder(tmp_path)


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret.bin").write_bytes(record(feature_file()))
    for name in ("../secret.bin", str(tmp_path / "secret.bin")):
        with pytest.raises(ValueError, match="expected the plain name of a file"):
            FeatureFolder(write_packed(tmp_path / "packed", [record(feature_file())], name=name))
    for content in (b"", gzip.compress(b"3"), gzip.compress(b'[{"filename": "a", "offsets": [3, 1]}]')):
        (tmp_path / "packed" / "index.json.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.json\.gz: expected an index of packed feature files"):
            FeatureFolder(tmp_path / "packed")
