"""``fasttc graph diff``."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_transcoders, table, verb
from fasttc.cli._graphs import cosines, read_whole

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
    "--base-transcoders", metavar="TCS", help="With --tuned-transcoders: which features may be matched."
)
@click.option("--tuned-transcoders", metavar="TCS", help="The adapted set.")
@click.option(
    "--min-cosine",
    default=0.9,
    show_default=True,
    help="Least cosine of encoder and of decoder rows at which a feature still counts as the same.",
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
@verb
def command(
    run: Run,
    base: Path,
    tuned: Path,
    prompts: tuple[tuple[Path, Path], ...],
    groups: Path | None,
    base_transcoders: str | None,
    tuned_transcoders: str | None,
    min_cosine: float,
    count: int,
    least_change: float,
    joint: Path | None,
) -> None:
    """What differs between the graphs BASE and TUNED of one prompt in a model before and after fine-tuning.

    Features are matched by layer, number and position. Give whole graphs: of pruned ones from a file, what was
    dropped counts as absent. With --prompts, features are tested over all prompts (sign-flip test, q = corrected for
    the number of features).
    """
    from fasttc.graph import Supernodes, diff, feature_changes

    if (base_transcoders is None) != (tuned_transcoders is None):
        raise ValueError("expected both of --base-transcoders and --tuned-transcoders, or neither")
    carried = None
    if base_transcoders is not None and tuned_transcoders is not None:
        carried = _carried(run, base_transcoders, tuned_transcoders, min_cosine)
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
    run.finish(result, "\n".join(text))


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


def _carried(run: Run, base: str, tuned: str, least: float) -> set[tuple[int, int]]:
    """Features whose encoder and decoder rows kept their direction."""
    sets = load_transcoders(run, base), load_transcoders(run, tuned)
    if sets[0].layers != sets[1].layers:
        raise ValueError(f"--tuned-transcoders: expected layers {sets[0].layers}, got {sets[1].layers}")
    carried: set[tuple[int, int]] = set()
    for layer, before, after in zip(sets[0].layers, *sets, strict=True):
        if before.W_enc.shape != after.W_enc.shape:
            raise ValueError(
                f"--tuned-transcoders: expected as many features as in {base}, layer {layer} differs"
            )
        same = (cosines(before.W_enc, after.W_enc) >= least) & (cosines(before.W_dec, after.W_dec) >= least)
        carried |= {(layer, index) for index in same.nonzero().squeeze(1).tolist()}
    return carried
