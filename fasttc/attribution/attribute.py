"""``attribute``: the attribution graph of a prompt."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fasttc
from fasttc.attribution.collect import collect_rows
from fasttc.attribution.owners import Owners
from fasttc.attribution.plan import make_budget
from fasttc.attribution.prompt import Prompt, token_ids, token_names
from fasttc.attribution.rows import Kept, Rows, merge_rows
from fasttc.attribution.sources import Sources
from fasttc.attribution.targets import Resolver, Root, Target
from fasttc.attribution.team import ALONE, Team, the_team
from fasttc.attribution.trace import Progress, Sweep
from fasttc.graph import Graph
from fasttc.models.linear import LayerWeights, Unembedding, layer_weights, unembedding
from fasttc.nn import AdapterSet, TranscoderSet


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The keyword arguments of :func:`attribute`, with the same defaults."""

    tokenizer: Any = None
    targets: Sequence[Target] | Tensor | None = None
    max_logits: int = 10
    logit_prob: float = 0.95
    max_feature_nodes: int | None = None
    refresh: int = 2048
    edge_share: float = 1.0
    memory_budget: int | None = None
    dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    progress: bool = False
    prepend_bos: bool = True
    distributed: bool = True
    adapters: AdapterSet | None = None
    base: nn.Module | None = None

    def __post_init__(self) -> None:
        if not 0 < self.edge_share <= 1:
            raise ValueError(f"edge_share: expected a number in (0, 1], got {self.edge_share!r}")
        for name in ("max_feature_nodes", "refresh"):
            number = getattr(self, name)
            if number is None and name == "max_feature_nodes":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}: expected a positive int, got {number!r}")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"dtype: expected torch.float32 or torch.float64, got {self.dtype} (weight_dtype takes shorter ones)"
            )
        if self.weight_dtype is not None and not self.weight_dtype.is_floating_point:
            raise ValueError(f"weight_dtype: expected a floating-point dtype, got {self.weight_dtype}")


def attribute(
    model: nn.Module,
    tcs: TranscoderSet | None,
    prompt: Prompt,
    *,
    tokenizer: Any = None,
    targets: Sequence[Target] | Tensor | None = None,
    max_logits: int = 10,
    logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    refresh: int = 2048,
    edge_share: float = 1.0,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    progress: bool = False,
    prepend_bos: bool = True,
    distributed: bool = True,
    adapters: AdapterSet | None = None,
    base: nn.Module | None = None,
) -> Graph:
    """The attribution graph of one prompt.

    Edges are direct effects in the local replacement model (attention patterns and norm scales frozen, MLPs replaced
    by the transcoders plus error terms): how much a source's whole contribution adds to a feature's pre-activation or
    to a target. All of them are computed by one sweep of explicit linear algebra, without autograd.

    Args:
        model: a transformers causal language model of a supported family, also PEFT-wrapped. Not changed.
        tcs: one transcoder per layer; None with adapters and their base alone.
        prompt: text, or token ids (a list of int or a tensor ``[T]``), which are used as given.
        tokenizer: needed for text; names the tokens of the graph.
        targets: what the graph explains: token ids, texts of single tokens, ``Logit``, ``LogitDifference``,
            ``Direction``, ``Feature``. None: the fewest most probable next tokens that reach ``logit_prob``, at most
            ``max_logits``.
        max_logits: see ``targets``.
        logit_prob: see ``targets``.
        max_feature_nodes: at most so many feature nodes, chosen by their influence on the targets; None for all.
        refresh: features added between two rankings, where not all are taken.
        edge_share: each row stores the fewest edges that reach this share of its absolute sum, and the sum of the
            others as its remainder; 1 stores all non-zero edges.
        memory_budget: bytes of the sweep's working set (beyond model, frozen patterns and graph), and as much again
            for rows that wait while features are ranked; rows beyond that go to the host's memory (from a GPU) or to
            a temporary file (from the CPU). None: 1 GiB and any number of rows, or a quarter each of a GPU's free
            memory.
        dtype: of the arithmetic and of the edges: float32 or float64; by default float64 for a float64 model, else
            float32.
        weight_dtype: of the attention weights in the sweep, by default ``dtype``. ``torch.bfloat16`` uses tensor
            cores on a GPU, with float32 sums.
        progress: shows a progress bar.
        prepend_bos: puts a beginning-of-sequence token in front of text that has no special token there.
        distributed: inside an initialised ``torch.distributed`` group (any back end), all processes call this with
            the same arguments; they share the targets, and each gets the whole graph, the same as that of a single
            process. False: this process works alone.
        adapters: their features become nodes, too (``Graph.from_adapter``), with indices after those of the layer's
            transcoder. With ``tcs``, errors are what both leave over together. Without, the dense MLPs of ``base`` are
            linear paths by the rules of RelP (arXiv 2602.20904), and there are no errors: replacement and
            completeness are then 1 by construction and say nothing.
        base: the model is run as ``models.hybrid(model, base, adapters)``. None: as it is.

    Returns:
        Graph on the CPU: the features from which a path of edges can lead to a target, all errors and tokens.
        ``metadata`` records the precision and everything else that is needed to make it again. Deterministic: the
        same call on the same machine gives the same bits.

    Raises:
        ValueError: transcoders that do not fit the model, a prompt that is empty, too long or not understood, a
            target that does not exist, NaN activations, a memory budget that does not hold one target.
        TypeError: arguments of a wrong type.
        ConnectionError: another process failed, ended or did not answer for 45 s.
    """
    options = _Options(
        tokenizer=tokenizer,
        targets=targets,
        max_logits=max_logits,
        logit_prob=logit_prob,
        max_feature_nodes=max_feature_nodes,
        refresh=refresh,
        edge_share=edge_share,
        memory_budget=memory_budget,
        dtype=dtype,
        weight_dtype=weight_dtype,
        progress=progress,
        prepend_bos=prepend_bos,
        distributed=distributed,
        adapters=adapters,
        base=base,
    )
    (graph,) = _graphs(model, tcs, [prompt], options)
    return graph


def attribute_many(
    model: nn.Module, tcs: TranscoderSet | None, prompts: Iterable[Prompt], **options: Any
) -> Iterator[Graph]:
    """Graphs of several prompts, one after another as they are asked for; what no prompt changes is done once.

    Args:
        model: as for :func:`attribute`.
        tcs: as for :func:`attribute`.
        prompts: texts or lists of token ids.
        options: keyword arguments of :func:`attribute`, for all prompts.

    Raises:
        ValueError, TypeError: as :func:`attribute`, when the graph concerned is asked for.
    """
    return _graphs(model, tcs, prompts, _Options(**options))


def _graphs(
    model: nn.Module, tcs: TranscoderSet | None, prompts: Iterable[Prompt], options: _Options
) -> Iterator[Graph]:
    owners = Owners(tcs, options.adapters, options.base)
    owners.check(model)
    if options.dtype is None:
        double = next(model.parameters()).dtype == torch.float64
        options = replace(options, dtype=torch.float64 if double else torch.float32)
    if options.weight_dtype is None:
        options = replace(options, weight_dtype=options.dtype)
    assert options.dtype is not None and options.weight_dtype is not None, "both were just set"  # noqa: PT018
    weights = layer_weights(model, dtype=options.weight_dtype)
    last = unembedding(model)
    with the_team() if options.distributed else nullcontext(ALONE) as team:
        for prompt in prompts:
            yield _one_graph(model, owners, prompt, options, weights, last, team)


def _one_graph(
    model: nn.Module,
    owners: Owners,
    prompt: Prompt,
    options: _Options,
    weights: tuple[LayerWeights, ...],
    last: Unembedding,
    team: Team,
) -> Graph:
    assert options.dtype is not None, "set by the caller"
    ids = token_ids(prompt, options.tokenizer, prepend_bos=options.prepend_bos)
    frozen, sources, linear = owners.read(model, ids, options.dtype, weights)
    resolver = Resolver(linear, sources, frozen.final, last, options.tokenizer)
    roots = resolver.roots(options.targets, options.max_logits, options.logit_prob)
    budget = make_budget(options.memory_budget, frozen.embedding.device)
    budget = replace(budget, limit=team.smallest(budget.limit))
    team.check_same(
        prompt=zlib.crc32(bytes(str(ids.tolist()), "ascii")),
        targets=[(root.id, root.position, root.weight) for root in roots],
        features=sources.feature_ptr,
        options=[options.max_feature_nodes, options.refresh, options.edge_share],
    )
    with _bar(options.progress) as progress:
        kept, writer = collect_rows(
            Sweep(linear, sources, budget, team),
            roots,
            share=options.edge_share,
            limit=options.max_feature_nodes,
            refresh=options.refresh,
            progress=progress,
        )
    rows = merge_rows(team, writer.finish(_row_numbers(kept, len(roots))), kept.count + len(roots))
    metadata = _metadata(model, owners, sources, roots, options)
    return _graph(prompt, ids, sources, roots, kept, rows, options, metadata)


def _row_numbers(kept: Kept, n_roots: int) -> Tensor:
    """The graph's number of each row of the sweep: kept features, then targets; -1 for other features."""
    numbers = torch.full((kept.total + n_roots,), -1)
    numbers[: kept.total][_chosen(kept)] = torch.arange(kept.count)
    numbers[kept.total :] = kept.count + torch.arange(n_roots)
    return numbers


def _chosen(kept: Kept) -> Tensor | slice:
    return slice(None) if kept.nodes is None else torch.tensor(kept.nodes, dtype=torch.int64)


@contextmanager
def _bar(show: bool) -> Iterator[Progress | None]:
    """A progress bar over shares of the work; yields what to call with each share, or None."""
    if not show:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=1.0, desc="edges", unit="", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield bar.update


def _graph(
    prompt: Prompt,
    ids: Tensor,
    sources: Sources,
    roots: list[Root],
    kept: Kept,
    rows: Rows,
    options: _Options,
    metadata: dict[str, Any],
) -> Graph:
    nodes = _chosen(kept)
    unreached = sources.n_layers * sources.n_tokens + sources.n_tokens  # errors and tokens have no inputs
    empty = torch.zeros(unreached, dtype=torch.int64)
    lengths = torch.cat([rows.counts[: kept.count], empty, rows.counts[kept.count :]])
    names = token_names(ids, options.tokenizer)
    return Graph(
        n_layers=sources.n_layers,
        features=sources.features().cpu()[nodes],
        activations=sources.activations().cpu()[nodes],
        input_ids=ids,
        logit_ids=torch.tensor([root.id for root in roots]),
        logit_probs=torch.tensor([root.weight for root in roots], dtype=torch.float64),
        row_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        columns=rows.columns,
        values=rows.values,
        remainder=torch.cat([rows.remainder[: kept.count], empty.double(), rows.remainder[kept.count :]]),
        tokens=names,
        logit_labels=[root.label for root in roots],
        prompt=prompt if isinstance(prompt, str) else "" if options.tokenizer is None else "".join(names),
        metadata=metadata,
    )


def _metadata(
    model: nn.Module, owners: Owners, sources: Sources, roots: list[Root], options: _Options
) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return {
        "fasttc": fasttc.__version__,
        "torch": torch.__version__,
        "model": getattr(config, "name_or_path", ""),
        **owners.metadata(),
        "precision": {
            "model": _dtype_name(next(model.parameters()).dtype),
            "transcoders": _dtype_name(owners.dtype),
            "attention_weights": _dtype_name(options.weight_dtype),
            "arithmetic": _dtype_name(options.dtype),
            "device": sources.embedding.device.type,
        },
        "active_features": sources.n_features,
        "target_positions": [root.position for root in roots],
        "targets_given": options.targets is not None,
        "max_logits": options.max_logits,
        "logit_prob": options.logit_prob,
        "max_feature_nodes": options.max_feature_nodes,
        "refresh": options.refresh,
        "edge_share": options.edge_share,
    }


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
