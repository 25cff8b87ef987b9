"""``fasttc graph diff``."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._carry_over import read_verdicts
from fasttc.cli._common import Run, plot_option, table, verb
from fasttc.cli._graphs import read_whole

_FILE = click.Path(path_type=Path, dir_okay=False)
_SHOWN = {"nodes": 12, "edges": 12, "paths": 8, "supernodes": 20}


@click.command("diff")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    nargs=2,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="BASE TUNED",
    help="Graphs of another prompt, for the significance of features; repeat it. Whole graphs.",
)
@click.option("--groups", type=_FILE, help="A supernode file, to compare its groups.")
@click.option(
    "--carry-over",
    type=_FILE,
    help="Table of features that fasttc adapt or evaluate --base wrote: only those it calls kept are matched.",
)
@click.option("-k", "count", default=10, show_default=True, help="Strongest paths of each graph to compare.")
@click.option(
    "--least-change",
    default=0.005,
    show_default=True,
    help="Of influence, as a share of the logits', that counts.",
)
@click.option(
    "--joint", type=_FILE, help="Write both graphs as one JSON for viewers, each node with its owner."
)
@plot_option("Nodes (with --groups: groups) that changed most,")
@verb
def command(
    run: Run,
    base: Path,
    tuned: Path,
    prompts: tuple[tuple[Path, Path], ...],
    groups: Path | None,
    carry_over: Path | None,
    count: int,
    least_change: float,
    joint: Path | None,
    plot: Path | None,
) -> None:
    """What differs between the graphs BASE and TUNED of one prompt in a model before and after fine-tuning.

    Features are matched by layer, number and position. Give whole graphs: of pruned ones from a file, what was
    dropped counts as absent. With --prompts, features are tested over all prompts (sign-flip test, q = corrected for
    the number of features); nodes, edges and paths are of one prompt, as positions differ between prompts.
    """
    from fasttc.graph import Supernodes, diff, feature_changes

    carried = None
    if carry_over is not None:
        carried = {feature for feature, verdict in read_verdicts(carry_over).items() if verdict == "kept"}
    one, two = read_whole(base), read_whole(tuned)
    found = diff(
        one,
        two,
        supernodes=Supernodes.load(groups) if groups is not None else None,
        carried=carried,
        paths=count,
        least_change=least_change,
    )
    result: dict[str, Any] = found.to_dict()
    text = [part for name in _SHOWN for part in _section(name, getattr(found, name))]
    if prompts:
        pairs = ((read_graph(first), read_graph(second)) for first, second in [(base, tuned), *prompts])
        tested = feature_changes(pairs, carried=carried, seed=run.seed)
        result["features"] = [one.to_dict() for one in tested]
        text += [
            "",
            f"features over {len(prompts) + 1} prompts",
            table([_tested(one) for one in tested[:15]]),
        ]
    if joint is not None:
        from fasttc._files import write_json
        from fasttc.graph.joint import joint_json

        write_json(joint, joint_json(one, two, slug=joint.stem, carried=carried))
        text += [f"wrote {joint}"]
    if plot is not None:
        _draw(found.supernodes if groups is not None else found.nodes, plot)
        run.say(f"wrote {plot}")
    run.finish(result, "\n".join(text))


def _draw(changes: list[Any], plot: Path) -> None:
    from fasttc.report.plots import diff_bars

    names = [change.name for change in changes]
    diff_bars(names, [change.base for change in changes], [change.tuned for change in changes], plot)


def read_graph(path: Path) -> Any:
    """A whole graph, or the kept part of a pruned one."""
    from fasttc.graph import whole_graph

    return whole_graph(read_whole(path))


def _section(name: str, changes: list[Any]) -> list[str]:
    if not changes:
        return []
    counts = {status: sum(change.status == status for change in changes) for status in _statuses()}
    told = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    rows = [
        {
            "status": change.status + ("" if change.trusted else " (not trusted)"),
            "base": change.base,
            "tuned": change.tuned,
            name: change.name,
        }
        for change in changes[: _SHOWN[name]]
    ]
    return ["", f"{name}: {told}", table(rows)]


def _statuses() -> tuple[str, ...]:
    from fasttc.graph.diff import STATUSES

    return STATUSES


def _tested(one: Any) -> dict[str, Any]:
    row = {"feature": f"L{one.feature[0]}/{one.feature[1]}", "base": one.base, "tuned": one.tuned}
    return {**row, "p": one.p, "q": one.q, "trusted": "yes" if one.trusted else "no"}
