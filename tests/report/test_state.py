"""What was edited in the page: its file, and whose groups hold after another merge."""

import json

import pytest

from fasttc.report import after_merge, read_state, set_aside, write_state
from fasttc.report.state import origin

SCHEMA = {"schema": "fasttc.supernodes/1"}


def merge_of(**groups):
    listed = [{"name": name, "members": members} for name, members in groups.items()]
    return {**SCHEMA, "groups": listed, "labels": {}, "pinned": []}


OLD, NEW = merge_of(a=["1_2_3", "1_2_4"]), merge_of(a=["1_2_3", "1_2_4", "1_2_5"])
EDITED = {**merge_of(mine=["1_2_3"]), "labels": {"1_2_3": "hip"}, "pinned": ["1_2_4"]}


def test_page_entries_survive_a_round_trip(tmp_path):
    state = {**EDITED, "page": {"moved": {"1_2_3": [1, 2]}}}
    write_state(tmp_path / "s.json", {**state, "other": 1})
    assert read_state(tmp_path / "s.json") == state
    write_state(tmp_path / "s.json", state, origin(OLD))
    assert read_state(tmp_path / "s.json") == {**state, "page": {**state["page"], "from": origin(OLD)}}
    with pytest.raises(ValueError, match="there is no file"):
        read_state(tmp_path / "absent.json")


def test_an_origin_names_the_content():
    assert origin(OLD) == origin(json.loads(json.dumps(dict(reversed(OLD.items())))))
    assert len({origin(OLD), origin(NEW), origin(EDITED), origin(None)}) == 4


def test_groups_give_way_to_those_of_another_merge(tmp_path):
    write_state(tmp_path / "s.json", EDITED, origin(OLD))
    saved = read_state(tmp_path / "s.json")
    found = after_merge(saved, NEW)
    assert found == {**EDITED, "groups": NEW["groups"], "page": {"from": origin(NEW)}}
    assert after_merge(found, NEW) is found


@pytest.mark.parametrize(
    "saved",
    [
        {**EDITED, "page": {"from": origin(NEW)}},  # edited in a page of this merge
        {**NEW, "groups": NEW["groups"][::-1], "page": {"from": origin(OLD)}},  # merged by this very file
        EDITED,  # by hand, or from another program
        {**EDITED, "page": 5},
    ],
)
def test_groups_hold_where_no_other_merge_made_them(saved):
    assert after_merge(saved, NEW) is saved


def test_a_file_without_groups_takes_those_of_the_merge():
    saved = {**merge_of(), "labels": {"1_2_3": "hip"}}
    assert after_merge(saved, NEW)["groups"] == NEW["groups"]
    assert after_merge(saved, NEW)["labels"] == saved["labels"]
    ungrouped = {**saved, "page": {"from": origin(NEW)}}
    assert after_merge(ungrouped, NEW)["groups"] == []


def test_copies_get_the_first_free_name(tmp_path):
    path = tmp_path / "m.supernodes.json"
    path.write_text("one")
    assert set_aside(path).name == "m.supernodes.1.json"
    path.write_text("two")
    assert set_aside(path).read_text() == "two"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "m.supernodes.json": "two", "m.supernodes.1.json": "one", "m.supernodes.2.json": "two",
    }  # fmt: skip
