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
    """The strongest paths to a logit in GRAPHS, its influence by path length, and the share through given concepts.

    A NODE is an id (3_1741_5; of an error, 0_2_4_error), LAYER/FEATURE for a feature at any position (3/1741), or the
    name of a group. It need not be in every graph. The strength of a path is the share of the logit's input that runs
    along it.

    With --concept, 'multi-hop' is the share of the tokens' influence that passes through the concepts, 0 where none of
    them is active, 'direct' what passes through no feature at all; the interval is a bootstrap over GRAPHS.
    """
    from fasttc.graph import Supernodes, strongest_paths

    named = Supernodes.load(groups) if groups is not None else None
    loaded = [read_whole(path) for path in graphs]
    given = {"--from": sources, "--through": through, "--avoiding": avoiding, "--concept": concepts}
    begins, needed, barred, meant = (
        nodes_named(loaded, nodes, named, option) for option, nodes in given.items()
    )
    found = []
    for at, (path, graph) in enumerate(zip(graphs, loaded, strict=True)):
        best = strongest_paths(
            graph,
            count,
            logit=logit,
            sources=begins[at] if sources else None,
            through=needed[at] if through else None,
            avoiding=barred[at],
        )
        found.append({"graph": str(path), **_found(graph, best, logit)})
    result: dict[str, Any] = {"graphs": found}
    text = [_told(one) for one in found]
    if concepts:
        result["mechanism"], shares = _shares(graphs, loaded, meant, logit, run.seed)
        text += [shares]
    if plot is not None:
        _draw(found, plot)
        run.say(f"wrote {plot}")
    run.finish(result, "\n\n".join(text))


def _found(graph: Any, paths: list[Any], logit: int) -> dict[str, Any]:
    """Paths and lengths of one graph, as JSON holds them."""
    from fasttc.graph import length_profile, node_names, whole_graph

    ids, names, lengths = ids_of(graph), node_names(whole_graph(graph)), length_profile(graph, logit)
    rows = [
        {
            "strength": path.strength,
            "sign": "+" if path.sign > 0 else "-",
            "path": " -> ".join(names[node] for node in path.nodes),
            "nodes": [ids[node] for node in path.nodes],
        }
        for path in paths
    ]
    return {"paths": rows, "lengths": {**vars(lengths), "mean": lengths.mean_length()}}


def _told(one: dict[str, Any]) -> str:
    """The same for people."""
    paths = [{name: row[name] for name in ("strength", "sign", "path")} for row in one["paths"]]
    lengths = one["lengths"]
    rows = zip(lengths["tokens"], lengths["errors"], lengths["missing"], strict=True)
    by_length = [
        {"edges": edges, "ends in tokens": tokens, "in errors": errors, "not stored": missing}
        for edges, (tokens, errors, missing) in enumerate(rows, 1)
    ]
    return "\n".join([f"{one['graph']}:", table(paths) or "no such path", table(by_length)])


def _shares(
    paths: tuple[Path, ...], graphs: list[Any], meant: list[list[int]], logit: int, seed: int
) -> tuple[dict[str, Any], str]:
    """How much passes through the concepts, which are the features of all the graphs' nodes that were named."""
    from fasttc.graph import mechanism_report
    from fasttc.graph.mechanism import concept_features

    each = (concept_features(graph, nodes) for graph, nodes in zip(graphs, meant, strict=True))
    report = mechanism_report(graphs, set().union(*each), logit=logit, seed=seed)
    rows = [{"graph": str(path), **vars(one)} for path, one in zip(paths, report.prompts, strict=True)]
    return report.to_dict(), (
        f"{table(rows)}\n"
        f"multi-hop share {report.multi_hop:.3f} [{report.low:.3f}, {report.high:.3f}], "
        f"direct {report.direct:.3f}, unexplained {report.unexplained:.3f}"
    )


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
