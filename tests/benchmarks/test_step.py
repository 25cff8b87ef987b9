"""The walkthroughs' ``step``: a command that is shown can be pasted."""

import shlex
import subprocess
from pathlib import Path

STEP = Path(__file__).parents[2] / "benchmarks/step.sh"


def run(out: Path, told: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``step`` of the arguments with a ``fasttc`` that does what is told."""
    script = f'set -euo pipefail; data=/data out={out}; source {STEP}; fasttc() {{ {told}; }}; step "$@"; echo after'
    return subprocess.run(["bash", "-c", script, "bash", *arguments], capture_output=True, text=True)


def test_a_command_is_shown_as_it_can_be_pasted(tmp_path: Path) -> None:
    given = [
        "train",
        "/data/model",
        "--text",
        "{Q} {C}",
        "--lr",
        "1e-3",
        "--say",
        "it's $5",
        "",
        f"{tmp_path}/a",
    ]
    done = run(tmp_path, 'printf "%s|" "$@"; echo note >&2', *given)
    _, shown, ran, _ = done.stdout.split("\n")
    plain = [one.removeprefix("/data/").removeprefix(f"{tmp_path}/") for one in given]
    assert shlex.split(shown) == ["$", "fasttc", *plain]
    assert shown.startswith("$ fasttc train model --text '{Q} {C}' --lr 1e-3 --say ")
    assert ran == "".join(f"{one}|" for one in plain) + "after"
    assert (tmp_path / "stderr.log").read_text() == "note\n"
    assert done.returncode == 0


def test_a_step_that_fails_ends_the_walk(tmp_path: Path) -> None:
    done = run(tmp_path, "return 3", "train")
    assert done.returncode == 3
    assert "after" not in done.stdout
