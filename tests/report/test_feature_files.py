"""Feature files, read back the way the viewers read them."""

import gzip
import json
import struct
import zlib
from dataclasses import replace

import pytest

from fasttc.analysis import Example, FeatureEvidence
from fasttc.graph.export import feature_number
from fasttc.report import FeatureFolder
from fasttc.report.feature_files import BINS, feature_json, write_lines, write_packed, write_plain

NAMES = ["a", "</script>", "<b>", "d", "é"]


def _evidence(layer, index):
    example = Example([0, 1, 4], [0.0, 2.5, 0.0], 1)
    return FeatureEvidence(
        layer, index, 200, 3, 2.5, 0.02, 1.5, [example], [[example], [], [], []], [0.5, 1.0, 2.5],
        [(1, 3.0)], [(2, -1.0)], [(3, 0.5)],
    )  # fmt: skip


def test_json_has_what_the_viewers_read():
    content = feature_json(_evidence(2, 7), NAMES, "set")
    assert content["index"] == 7
    assert content["transcoder_id"] == "set-2"
    assert content["owner"] == "transcoder"
    assert [q["quantile_name"] for q in content["examples_quantiles"]][:2] == ["Top", "Subsample interval 0"]
    example = content["examples_quantiles"][0]["examples"][0]
    assert example["tokens"] == ["a", "</script>", "é"]
    assert example["tokens_acts_list"][example["train_token_ind"]] == 2.5
    assert content["top_logits"] == ["</script>"]
    assert content["bottom_logits"] == ["<b>"]
    assert len(content["histogram"]) == BINS
    assert sum(content["histogram"]) == 3
    assert content["activation_frequency"] == pytest.approx(0.015)
    assert content["quantile_values"][0] == 0.5
    assert content["quantile_values"][-1] == content["act_max"] == 2.5


def test_a_feature_that_never_fires_has_a_file_too(tmp_path):
    silent = FeatureEvidence(
        0, 1, 10, 0, 0.0, 0.0, 1.0, [], [[], [], [], []], [], [(0, 1.0)], [(1, -1.0)], [(2, 0.0)]
    )
    content = json.loads(next(write_plain(tmp_path, "s", [silent], NAMES).iterdir()).read_text())
    assert content["activation_frequency"] == 0.0
    assert content["examples_quantiles"][0]["examples"] == []


def test_plain_files_are_named_by_the_graph_number(tmp_path):
    found = [_evidence(0, 3), _evidence(4, 1)]
    where = write_plain(tmp_path, "set", found, NAMES)
    assert where == tmp_path / "set"
    for evidence in found:
        content = json.loads((where / f"{feature_number(evidence.layer, evidence.index)}.json").read_text())
        assert (content["layer"], content["index"]) == (evidence.layer, evidence.index)
    assert len(list(where.iterdir())) == 2


def test_packed_records_are_found_by_their_offsets(tmp_path):
    found = [_evidence(0, 0), _evidence(0, 4), _evidence(2, 3)]
    folder = write_packed(tmp_path / "packed", "set", found, NAMES, n_features=5)
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert len(index) == 3
    present = set()
    for layer, entry in enumerate(index):
        content = (folder / entry["filename"]).read_bytes()
        assert len(entry["offsets"]) == 6
        assert entry["offsets"][-1] == len(content)
        for feature in range(5):
            record = content[entry["offsets"][feature] : entry["offsets"][feature + 1]]
            if record:
                (length,) = struct.unpack("<I", record[:4])
                assert length == len(record) - 4
                assert json.loads(zlib.decompress(record[4:]))["index"] == feature
                present.add((layer, feature))
    assert present == {(0, 0), (0, 4), (2, 3)}
    first = (folder / "index.json.gz").read_bytes()
    write_packed(tmp_path / "packed", "set", found, NAMES, n_features=5)
    assert (folder / "index.json.gz").read_bytes() == first, "not the same bytes from run to run"


@pytest.mark.parametrize("strange", ["notes.txt", "set", "layer_0.bin"])
def test_packed_files_replace_nothing_but_packed_files(tmp_path, strange):
    folder, found = tmp_path / "out", [_evidence(0, 0)]
    folder.mkdir()
    write_packed(folder, "set", found, NAMES, n_features=1)
    if strange == "set":  # what the plain format writes
        write_plain(folder, "set", found, NAMES)
    elif strange == "layer_0.bin":  # without its index
        (folder / "index.json.gz").unlink()
    else:
        (folder / strange).write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=rf"out: expected an empty folder or .* got a folder with {strange}"):
        write_packed(folder, "set", found, NAMES, n_features=1)
    assert sorted(folder.rglob("*")) == before


def test_files_say_that_features_are_an_adapters(tmp_path):
    plain = write_plain(tmp_path, "a", [_evidence(0, 3)], NAMES, "adapter")
    packed = write_packed(tmp_path / "packed", "a", [_evidence(0, 3)], NAMES, 5, "adapter")
    for folder in (plain, packed):
        assert FeatureFolder(folder).find(0, 3) is None
        assert FeatureFolder(folder).find(0, 3, "adapter")["top"] == ["</script>"]


def test_lines_show_each_feature_to_a_reader(tmp_path, tiny_tokenizer):
    names = [tiny_tokenizer.decode([i]) for i in range(61)]
    examples = [Example([5, 6, 7], [0.0, 2.5, 1.0], 1), Example([8], [0.5], 0)]
    loud = replace(_evidence(2, 7), top=examples, promoted=[(9, 1.0)], suppressed=[(4, -1.0)])
    silent = replace(_evidence(3, 0), n_active=0, top=[], maximum=0.0, mean=0.0)
    path = write_lines(tmp_path / "f.jsonl", [loud, silent], names, tiny_tokenizer.decode)
    first, second = map(json.loads, path.read_text().splitlines())
    assert [example["text"] for example in first.pop("examples")] == ["t5 «t6» t7", "«t8»"]
    assert first == {
        "id": "2:7", "layer": 2, "feature": 7, "firing_rate": 0.015, "max_activation": 2.5, "mean_activation": 0.02,
        "decoder_norm": 1.5, "strength": 0.02 * 1.5, "promoted": ["t9"], "suppressed": ["t4"],
    }  # fmt: skip
    assert (second["id"], second["strength"], second["examples"]) == ("3:0", 0.0, [])


def test_marks_stand_in_the_whole_text_where_tokens_are_parts_of_letters(tmp_path):
    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b" b"]

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    evidence = replace(_evidence(0, 0), top=[Example([0, 1, 2, 3], [0.0, 0.0, 1.0, 0.0], 2)])
    path = write_lines(tmp_path / "f.jsonl", [evidence], ["?"] * 5, decode)
    assert json.loads(path.read_text())["examples"][0]["text"] == "a«é» b"
