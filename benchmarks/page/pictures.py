"""The pictures of docs/viewer.md and docs/circuits.md, taken from the page itself in headless Chromium.

bash benchmarks/circuits/walkthrough.sh DATA OUT      makes what they show, and takes them into OUT/images
python -m benchmarks pictures --walkthrough OUT --out docs/images
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttc.benchmarks import record
from fasttc.graph import MergedGraph, load_graph
from fasttc.report import FeatureFolder, page_data, with_evidence, write_page

from .browser import browser, complaints, missing, ready
from .speed import random_graph, whole

MOST_BYTES = 190_000  # of one picture


@dataclass(frozen=True)
class Shot:
    """A picture: the page of ``data``, with what was edited, after a script; ``wide``: of a longer prompt."""

    name: str
    data: dict[str, Any]
    script: str = ""
    state: dict[str, Any] | None = field(default=None, repr=False)
    wide: bool = False


_STRONGEST = """
const found = d3.sort(fasttc.app.scene.nodes.filter((n) => n.kind === 'feature'), (n) => -n.influence);
"""
GROUPED = (
    _STRONGEST
    + """
fasttc.state.group(found.filter((n) => n.layer === 0).slice(0, 3).map((n) => n.id), 'reads the findings');
fasttc.state.group(found.filter((n) => n.layer >= 2).slice(0, 3).map((n) => n.id), 'says the drug');
fasttc.app.select('group:says the drug');
"""
)
SELECTED = (
    _STRONGEST
    + """
fasttc.app.select(found[0].key);
setTimeout(() => document.querySelector('.evidence')?.scrollIntoView(), 200);
"""
)
LARGEST_GROUP = """
const groups = fasttc.app.scene.nodes.filter((n) => n.kind === 'group' && n.layer > 0);
fasttc.app.select(d3.greatest(groups, (n) => n.influence).key);
"""
OF_THE_ADAPTER = """
const own = fasttc.app.scene.nodes.filter((n) => n.adapter);
fasttc.app.select(d3.greatest(own, (n) => n.influence).key);
"""
DARK_DIFF = """
document.querySelector('#views input[value=diff]').click(); document.getElementById('theme').click();
"""


def shots(folder: Path) -> list[Shot]:
    """Everything that is shown of a folder that ``circuits/walkthrough.sh`` wrote."""

    def data(name: str, base: str | None = None, features: str | None = None) -> dict[str, Any]:
        graph = load_graph(folder / f"{name}.graph")
        shown = graph.pruned if isinstance(graph, MergedGraph) else graph
        other: Any = None if base is None else load_graph(folder / f"{base}.graph")
        made = page_data(shown, base=other, name=name)
        return (
            made
            if features is None
            else with_evidence(made, [FeatureFolder(folder / "features" / features)])[0]
        )

    merged = MergedGraph.load(folder / "two_hop.merged.graph").supernodes().to_dict()
    pair = data("tuned", base="two_hop")
    clinical = data("two_hop", features="base")
    return [
        Shot("page-groups", clinical, GROUPED),
        Shot("page-feature", clinical, SELECTED),
        Shot("page-diff-dark", pair, DARK_DIFF),
        Shot("page-500-nodes", whole(page_data(random_graph(), name="pictures"))),
        Shot("circuits-merged", data("two_hop.merged", features="base"), LARGEST_GROUP, merged),
        Shot("circuits-joint", data("joint.pruned"), OF_THE_ADAPTER),
        Shot("circuits-stories", data("ft.few", features="ft"), SELECTED, wide=True),
    ]


def take(out: Path, chosen: list[Shot]) -> list[dict[str, Any]]:
    """Writes the PNG files; returns their names and sizes."""
    out.mkdir(parents=True, exist_ok=True)
    taken = []
    for wide, size in ((False, (1120, 660)), (True, (1400, 760))):
        with tempfile.TemporaryDirectory() as folder, browser(*size) as driver:
            for shot in (shot for shot in chosen if shot.wide == wide):
                page = Path(folder) / f"{shot.name}.html"
                write_page(page, shot.data, shot.state)
                driver.get(page.as_uri())
                ready(driver)
                driver.execute_script(shot.script)
                time.sleep(0.6)  # the drawing's next frames
                path = out / f"{shot.name}.png"
                path.write_bytes(_smaller(driver.get_screenshot_as_png()))
                taken.append({"name": path.name, "bytes": path.stat().st_size, "console": complaints(driver)})
                driver.execute_script("localStorage.clear()")
    return taken


def _smaller(png: bytes) -> bytes:
    """The picture with as many colours, up to 256, as make it small enough for a repository."""
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 192, 128, 96, 64):
        small = io.BytesIO()
        few = picture.quantize(colours, method=Image.Quantize.MAXCOVERAGE, kmeans=8, dither=Image.Dither.NONE)
        few.save(small, "PNG", optimize=True)
        if small.tell() <= MOST_BYTES:
            break
    return small.getvalue()


def main(arguments: list[str]) -> int:
    parser = record.parser("pictures", __doc__)
    parser.add_argument("--walkthrough", type=Path, required=True, help="what circuits/walkthrough.sh wrote")
    parser.add_argument("--only", help="just the picture of this name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"pictures: {reason}", file=sys.stderr)
        return 2
    chosen = [shot for shot in shots(options.walkthrough) if options.only in (None, shot.name)]
    if not chosen:
        parser.error(f"--only: expected the name of a picture, got {options.only!r}")
    taken = take(options.out, chosen)
    if options.json:
        print(json.dumps({"pictures": taken}, indent=2))
    else:
        print("\n".join(f"{one['name']}  {one['bytes']:,} bytes" for one in taken))
    return int(any(one["console"] for one in taken))
