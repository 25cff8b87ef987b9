"""The pictures of docs/viewer.md, taken from the page itself in headless Chromium.

fasttc demo                                    # writes fasttc-demo/, a minute or two on two cores
python -m benchmarks pictures --demo fasttc-demo --features fasttc-demo/features --out docs/images
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fasttc.graph import load_graph
from fasttc.report import FeatureFolder, page_data, with_evidence, write_page

from .browser import browser, complaints, missing, ready
from .page import random_graph, whole

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
DARK_DIFF = """
document.querySelector('#views input[value=diff]').click(); document.getElementById('theme').click();
"""


def shots(demo: Path, features: Path | None) -> list[tuple[str, dict[str, Any], str]]:
    """Name, data and script of each picture."""
    tuned, base = (load_graph(demo / f"{name}.graph") for name in ("finetuned", "base"))
    pair = page_data(tuned, base=base, name="pictures")
    evidence = pair if features is None else with_evidence(pair, FeatureFolder(features))[0]
    return [
        ("page-groups", evidence, GROUPED),
        ("page-feature", evidence, SELECTED),
        ("page-diff-dark", pair, DARK_DIFF),
        ("page-500-nodes", whole(page_data(random_graph(), name="pictures")), ""),
    ]


def take(out: Path, chosen: list[tuple[str, dict[str, Any], str]]) -> list[dict[str, Any]]:
    """Writes the PNG files; returns their names and sizes."""
    out.mkdir(parents=True, exist_ok=True)
    taken = []
    with tempfile.TemporaryDirectory() as folder, browser(1120, 660) as driver:
        for name, data, script in chosen:
            page = Path(folder) / f"{name}.html"
            write_page(page, data)
            driver.get(page.as_uri())
            ready(driver)
            driver.execute_script(script)
            time.sleep(0.6)  # the drawing's next frames
            path = out / f"{name}.png"
            path.write_bytes(_smaller(driver.get_screenshot_as_png()))
            taken.append({"name": path.name, "bytes": path.stat().st_size, "console": complaints(driver)})
            driver.execute_script("localStorage.clear()")
    return taken


def _smaller(png: bytes) -> bytes:
    """The picture with 96 colours: a quarter of the bytes, and hardly a difference to the eye."""
    import io

    from PIL import Image

    small = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--demo", type=Path, required=True, help="what fasttc demo wrote")
    parser.add_argument("--features", type=Path, help="feature files of its transcoders (fasttc features)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"pictures: {reason}", file=sys.stderr)
        return 2
    taken = take(options.out, shots(options.demo, options.features))
    if options.json:
        print(json.dumps({"pictures": taken}, indent=2))
    else:
        print("\n".join(f"{one['name']}  {one['bytes']:,} bytes" for one in taken))
    return int(any(one["console"] for one in taken))
