"""Tables of what carried over, read for graphs: verdicts by feature, and lines that are none."""

from pathlib import Path

import pytest

from fasttc.cli._carry_over import read_verdicts


def test_verdicts_by_feature(tmp_path: Path) -> None:
    table = tmp_path / "features.csv"
    table.write_text("layer,feature,verdict,base_rate\n0,3,kept,0.1\n2,5,newly used,0\n")
    assert read_verdicts(table) == {(0, 3): "kept", (2, 5): "newly used"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layer,feature\n0,3\n", "--carry-over: expected columns layer, feature and verdict in"),
        ("layer,feature,verdict\n0,3,kept\n0,4\n", "expected two numbers and a verdict in .* line 3"),
        ("layer,feature,verdict\n0\n", "expected two numbers and a verdict in .* line 2"),
        ("layer,feature,verdict\nx,4,kept\n", "expected two numbers and a verdict in .* line 2"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    table = tmp_path / "features.csv"
    table.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_verdicts(table)
    with pytest.raises(ValueError, match="there is no file"):
        read_verdicts(tmp_path / "none.csv")
