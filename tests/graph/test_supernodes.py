"""The file of groups, labels and pins."""

import json

import pytest

from fasttc.graph import Supernodes

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\ud800é\"'"
MADE = Supernodes(
    groups={"a disease": ("1_2_3", "2_2_3"), HOSTILE: ("E_5_0",)},
    labels={"1_2_3": HOSTILE},
    pinned=("4_7_5",),
)


def test_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "a.supernodes.json"
    MADE.save(path)
    assert Supernodes.load(path) == MADE
    assert list(Supernodes.load(path).groups) == ["a disease", HOSTILE]
    assert b"<" not in path.read_bytes()
    assert json.loads(path.read_text())["schema"] == "fasttc.supernodes/1"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_reads_what_a_later_minor_version_might_add():
    content = {
        "schema": "fasttc.supernodes/1",
        "colours": {},
        "groups": [{"name": "a", "members": ["x"], "n": 1}],
    }
    assert Supernodes.from_dict(content) == Supernodes(groups={"a": ("x",)})
    assert Supernodes.from_dict({"schema": "fasttc.supernodes/1"}) == Supernodes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"schema": "fasttc.supernodes/2"},
            "schema: expected 'fasttc.supernodes/1', got 'fasttc.supernodes/2'",
        ),
        ({"groups": {}}, "groups: expected a list, got dict"),
        ({"groups": ["a"]}, "groups: expected .*, got 'a'"),
        ({"groups": [{"name": "a", "members": "xy"}]}, "groups: expected"),
        ({"groups": [{"name": 3, "members": ["x"]}]}, "groups: expected strings, got 3"),
        ({"groups": [{"name": " ", "members": ["x"]}]}, "groups: expected a name and at least one member"),
        ({"groups": [{"name": "a", "members": []}]}, "groups: expected a name and at least one member"),
        (
            {"groups": [{"name": "a", "members": ["x"]}] * 2},
            "groups: expected every name once, got 'a' twice",
        ),
        (
            {"groups": [{"name": "a", "members": ["x"]}, {"name": "b", "members": ["x"]}]},
            "groups: expected every node in one group, got 'x' in 'a' and 'b'",
        ),
        ({"groups": [{"name": "a", "members": ["x", "x"]}]}, "got 'x' in 'a' and 'a'"),
        ({"labels": {"x": 3}}, "labels: expected strings, got 3"),
        ({"labels": []}, "labels: expected a dict, got list"),
        ({"pinned": [None]}, "pinned: expected strings, got None"),
        ({"pinned": ["x", "x"]}, "pinned: expected every id once"),
    ],
)
def test_refuses_broken_files_and_names_them(tmp_path, changed, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"schema": "fasttc.supernodes/1", **changed}))
    with pytest.raises(ValueError, match=message) as caught:
        Supernodes.load(path)
    assert str(caught.value).startswith(str(path))


def test_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="there is no file of that name"):
        Supernodes.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file"):
        Supernodes.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"schema: expected 'fasttc\.supernodes/1', got 'list'"):
        Supernodes.load(path)


def test_viewer_state_there_and_back():
    state = MADE.to_q_params()
    assert state["supernodes"] == [["a disease", "1_2_3", "2_2_3"], [HOSTILE, "E_5_0"]]
    assert state["pinnedIds"] == ["4_7_5", "1_2_3", "2_2_3", "E_5_0"]  # viewers draw pinned nodes only
    assert Supernodes.from_q_params(state).groups == MADE.groups


def test_viewer_state_that_breaks_the_rules_of_the_file():
    state = {
        "supernodes": [["a", "x", "x"], ["a", "y"], ["b", "x"], ["", "z"], ["c"]],
        "pinnedIds": ["x", "x"],
    }
    read = Supernodes.from_q_params(state)
    assert read.groups == {"a": ("x",), "a (2)": ("y",), "group": ("z",)}
    assert read.pinned == ("x",)
    assert Supernodes.from_q_params({"supernodes": None}) == Supernodes()
