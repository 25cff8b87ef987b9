"""Every kind of input becomes documents, or one clear line says why not."""

import json
from pathlib import Path

import pytest

from fasttc.training.documents import digest, read_documents


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


RECORDS = [{"Q": "why", "C": ["a", "b"], "A": None, "n": 3}, {"Q": "how", "C": [], "A": "so", "n": 4}]


def test_txt_documents_are_separated_by_blank_lines(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\r\ntwo\r\n\r\n \t\nthree\n\n\n")
    assert read_documents(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps({"id1": RECORDS[0], "id2": RECORDS[1]})),
    ],
)
def test_records_and_template(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert read_documents(str(path), text="{Q}: {C} {A}{n}{{}}") == ["why: a b 3{}", "how:  so4{}"]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", text="{Q} {C}") == ["why a b", "how "]
    with pytest.raises(ValueError, match="expected a parquet file"):
        read_documents(write(tmp_path, "b.parquet", "not parquet"))


def test_pubmedqa(shared_data):
    documents = read_documents(
        shared_data / "pubmedqa" / "ori_pqal.json", text="{QUESTION} {CONTEXTS} {LONG_ANSWER}"
    )
    assert len(documents) == 1000
    assert documents[0].startswith("Do mitochondria play a role in remodelling lace plant leaves")


def test_lists_in_memory():
    assert read_documents(["a", " ", "b"]) == ["a", "b"]
    assert [list(d) for d in read_documents([[1, 2], (3,), []])] == [[1, 2], [3]]
    assert [list(d) for d in read_documents([{"input_ids": [4, 5]}])] == [[4, 5]]
    assert read_documents([{"text": "c"}]) == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", " \n\n ", "found none"),
        ("a.txt", b"abc\0def", "is binary"),
        ("a.txt", b"\xff\xfe\xfa", "binary or in another encoding"),
        ("a.csv", "a,b", "ending in .txt, .jsonl, .json, .parquet"),
        ("a", "b", "ending 'missing'"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2"),
        ("a.json", "{", "expected JSON"),
        ("a.json", '{"data": [1, 2], "v": 1}', r"fields \['data', 'v'\]"),
        ("a.json", "3", "expected a list of records"),
        ("a.json", "[1.5]", "expected text, token ids or an object"),
        ("a.jsonl", '{"text": ""}\n{"text": null}', r"found none in .*\(2 records\)"),
        ("a.jsonl", '{"body": "x", "id": 1}', "expected the field 'text' in .*record 0; it has body, id"),
        ("a.jsonl", '{"text": {"a": 1}}', "expected text or a list in the field 'text'"),
        ("a.json", '["text", [1, 2]]', "records of one kind"),
        ("a.json", "[[1, -2]]", "token ids >= 0, got -2"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_documents(write(tmp_path, name, content))


def test_other_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        read_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="no such file"):
        read_documents("missing.jsonl")
    with pytest.raises(ValueError, match=r"no such file: missing\.csv"):
        read_documents("missing.csv")
    with pytest.raises(ValueError, match="got the folder"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="got an empty list"):
        read_documents([])
    with pytest.raises(TypeError, match="got int"):
        read_documents(3)
    with pytest.raises(ValueError, match="got a dict"):
        read_documents({"a": "b"})
    with pytest.raises(ValueError, match="fields in braces"):
        read_documents([{"text": "a"}], text="{text")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fasttc\[data\]'"):
        read_documents("someone/something")


def test_digest_tells_content_and_salt_apart():
    documents = ["a", "b", [97], [98]]
    assert len({digest(d, salt) for d in documents for salt in (0, 1)}) == 8
    assert digest([1, 2]) == digest((1, 2))
