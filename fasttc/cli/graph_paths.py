"""``fasttc graph paths``."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, plot_option, table, verb
from fasttc.cli._graphs import ids_of, nodes_named, read_whole

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("paths")
@click.argument("graphs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-k", "count", default=10, show_default=True, help="How many paths of each graph.")
@click.option("--logit", default=0, show_default=True, help="Which target, in the order of the graph.")
@click.option(
    "--from", "sources", multiple=True, metavar="NODE", help="Where paths begin. Default: all tokens."
)
@click.option("--through", multiple=True, metavar="NODE", help="Only paths through one of these.")
@click.option("--avoiding", multiple=True, metavar="NODE", help="Only paths through none of these.")
@click.option("--groups", type=_FILE, help="A supernode file; NODE may then be a group's name.")
@click.option(
    "--concept",
    "concepts",
    multiple=True,
    metavar="NODE",
    help="Report the share of the influence that passes through these features (of all GRAPHS, at any position).",
)
@plot_option("Influence by path length")
@verb
def command(
    run: Run,
    graphs: tuple[Path, ...],
    count: int,
    logit: int,
    sources: tuple[str, ...],
    through: tuple[str, ...],
    avoiding: tuple[str, ...],
    groups: Path | None,
    concepts: tuple[str, ...],
    plot: Path | None,
) -> None:
    """The strongest paths to a logit in GRAPHS, influence by path length, and the share through given concepts.

    A NODE is an id as in the exported JSON (3_1741_5), LAYER/FEATURE for a feature at any position (3/1741), or the
    name of a group. The strength of a path is the share of the logit's input that runs along it.

    With --concept, 'multi-hop' is the share of the tokens' influence that passes through the concepts, 'direct' what
    passes through no feature at all; the interval is a bootstrap over GRAPHS.
    """
    from fasttc.graph import Supernodes, length_profile, mechanism_report, strongest_paths
    from fasttc.graph.mechanism import concept_features

    named = Supernodes.load(groups) if groups is not None else None
    text, found, loaded = [], [], []
    chosen: set[tuple[int, int]] = set()
    for path in graphs:
        graph = read_whole(path)
        ids = ids_of(graph)

        def numbers(
            option: str, given: tuple[str, ...], graph: Any = graph, ids: list[str] = ids
        ) -> list[int]:
            return nodes_named(graph, ids, given, named, option)

        best = strongest_paths(
            graph,
            count,
            logit=logit,
            sources=numbers("--from", sources) if sources else None,
            through=numbers("--through", through) if through else None,
            avoiding=numbers("--avoiding", avoiding),
        )
        lengths = length_profile(graph)
        rows = _rows(graph, best)
        found.append(
            {
                "graph": str(path),
                "paths": [
                    {**row, "nodes": [ids[n] for n in one.nodes]} for row, one in zip(rows, best, strict=True)
                ],
                "lengths": {**vars(lengths), "mean": lengths.mean_length()},
            }
        )
        text += [f"{path}:", table(rows) or "no such path", _lengths(lengths), ""]
        chosen |= concept_features(graph, numbers("--concept", concepts)) if concepts else set()
        loaded.append(graph)
    result: dict[str, Any] = {"graphs": found}
    if concepts:
        report = mechanism_report(loaded, chosen, logit=logit, seed=run.seed)
        result["mechanism"] = report.to_dict()
        text += [
            table([{"graph": str(p), **vars(one)} for p, one in zip(graphs, report.prompts, strict=True)]),
            f"multi-hop share {report.multi_hop:.3f} [{report.low:.3f}, {report.high:.3f}], "
            f"direct {report.direct:.3f}, unexplained {report.unexplained:.3f}",
        ]
    if plot is not None:
        _draw(found, plot)
        run.say(f"wrote {plot}")
    run.finish(result, "\n".join(text).rstrip())


def _draw(found: list[dict[str, Any]], plot: Path) -> None:
    """Where the influence of one graph ends, by length; of several, what ends in tokens."""
    from fasttc.report.plots import influence_by_length

    if len(found) == 1:
        lengths = found[0]["lengths"]
        ends = {"ends in tokens": "tokens", "ends in errors": "errors", "not stored": "missing"}
        curves = {title: lengths[name] for title, name in ends.items() if any(lengths[name])}
    else:
        curves = {Path(one["graph"]).stem: one["lengths"]["tokens"] for one in found}
        if len(curves) < len(found):  # graphs of one name in several folders
            curves = {one["graph"]: one["lengths"]["tokens"] for one in found}
    influence_by_length(curves, plot)


def _rows(graph: Any, paths: list[Any]) -> list[dict[str, Any]]:
    from fasttc.graph import node_names, whole_graph

    names = node_names(whole_graph(graph))
    return [
        {
            "strength": path.strength,
            "sign": "+" if path.sign > 0 else "-",
            "path": " -> ".join(names[node] for node in path.nodes),
        }
        for path in paths
    ]


def _lengths(lengths: Any) -> str:
    rows = zip(lengths.tokens, lengths.errors, lengths.missing, strict=True)
    return table(
        [
            {"edges": n, "ends in tokens": tokens, "in errors": errors, "not stored": missing}
            for n, (tokens, errors, missing) in enumerate(rows, 1)
        ]
    )
