"""``fasttc graph view``: the page that shows a graph, served on this machine or written as a file."""

import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttc.cli._carry_over import read_verdicts
from fasttc.cli._common import Run, verb
from fasttc.cli._graphs import read_whole

if TYPE_CHECKING:
    from fasttc.report import FeatureFolder
    from fasttc.report.state import State


@click.command("view")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Graph of the base model on the same prompt: adds the views base and diff.",
)
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder of feature files, plain or packed: examples and logits of every feature. Twice, for those of "
    "transcoders and those of adapters.",
)
@click.option(
    "--carry-over",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Table of features that fasttc adapt or evaluate --base wrote: shown, and only those kept are matched.",
)
@click.option(
    "--supernodes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Groups, labels and pins: read from here and saved here. Default: GRAPH.supernodes.json; if GRAPH was merged "
    "anew since, the merge's groups take the place of those in it, which are kept beside it.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one file that needs no server and no network, instead of serving.",
)
@click.option("--port", default=0, show_default=True, help="0: any free one.")
@click.option("--open/--no-open", "open_page", default=True, help="Open the page in the browser.")
@verb
def command(
    run: Run,
    graph: Path,
    base: Path | None,
    features: tuple[Path, ...],
    carry_over: Path | None,
    supernodes: Path | None,
    html: Path | None,
    port: int,
    open_page: bool,
) -> None:
    """Read GRAPH in the browser: prune, label, group, compare, export. A merged graph starts with its groups.

    Serves on 127.0.0.1 at a secret address until Ctrl-C; what you edit is saved to the supernode file, which graph
    merge --from reads. With --html, one self-contained file is written, which keeps edits in the browser.
    """
    from fasttc.graph import MergedGraph, load_graph
    from fasttc.report import FeatureFolder, page_data

    loaded = load_graph(graph)
    merged = isinstance(loaded, MergedGraph)
    data = page_data(
        loaded.pruned if merged else loaded,
        base=None if base is None else read_whole(base),
        carried=None if carry_over is None else read_verdicts(carry_over),
        name=graph.stem,
    )
    merge = loaded.supernodes().to_dict() if merged else None
    folders = [FeatureFolder(folder) for folder in features]
    file = supernodes or graph.with_name(f"{graph.stem}.supernodes.json")
    state = _start(file, merge, explicit=supernodes is not None, served=html is None)
    if html is not None:
        _write(run, data, folders, state, html)
    else:
        _serve(run, data, folders, merge, file, port, open_page)


def _start(file: Path, merge: "State | None", *, explicit: bool, served: bool) -> "State | None":
    """What the page starts with: the file's content, in it the groups of a merge that was made since; else the merge.

    Where it is served, the file is brought up to that, and a copy of what it was is kept.
    """
    from fasttc.report import after_merge, read_state, set_aside, write_state

    if not file.exists() and (served or not explicit):
        return merge
    known = read_state(file)
    state = known if explicit or merge is None else after_merge(known, merge)
    if state is not known:
        old = f"{set_aside(file)} has" if served else f"--supernodes {file} takes"
        said = f"the graph was merged since {file} was written: the page has the groups of the merge"
        click.echo(f"{said}, {old} those of the file", err=True)
    if state is not known and served:
        write_state(file, state)
    return state


def _write(
    run: Run,
    data: dict[str, Any],
    features: "list[FeatureFolder]",
    state: "State | None",
    html: Path,
) -> None:
    from fasttc.report import with_evidence, write_page

    data, left_out = with_evidence(data, features)
    write_page(html, data, state)
    if left_out:
        run.say(
            f"the evidence of {left_out:,} features found no room in one file; served, the page shows all"
        )
    size = html.stat().st_size
    run.finish(
        {"out": str(html), "bytes": size, "features_left_out": left_out}, f"wrote {html} ({size:,} bytes)"
    )


def _serve(
    run: Run,
    data: dict[str, Any],
    features: "list[FeatureFolder]",
    merge: "State | None",
    supernodes: Path,
    port: int,
    open_page: bool,
) -> None:
    from fasttc.report import PageServer

    with PageServer(data, state_file=supernodes, state=merge, features=features, port=port) as server:
        run.finish(
            {"url": server.url, "supernodes": str(supernodes)},
            f"{server.url}\nedits are saved to {supernodes}; Ctrl-C ends",
        )
        if open_page:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):  # that is how it ends
            server.serve_forever()
