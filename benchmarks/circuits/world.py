"""The clinical world for the circuit benchmark: its models, the features that decode a disease, graphs, ablations."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttc import models
from fasttc._files import atomic_folder
from fasttc.attribution import Intervention, attribute, intervened
from fasttc.cli.demo import BUDGET, SHAPE, UPDATES
from fasttc.graph import Graph
from fasttc.models.build import build_causal_lm
from fasttc.nn import TranscoderSet
from fasttc.training import adapt, finetune, train
from fasttc.worlds import CLINICAL_MODEL, ClinicalWorld, Prompt

OTHER_QUESTIONS = ("ward", "test", "diet", "disease")
Feature = tuple[int, int]


@dataclass(frozen=True)
class Side:
    """A model with its transcoders."""

    model: Any
    tokenizer: Any
    tcs: TranscoderSet

    def graphs(self, prompts: Iterable[Prompt], *, answers: bool = True) -> Iterator[Graph]:
        """Graphs of the right drug's logit, or with the default targets: the likeliest tokens."""
        for prompt in prompts:
            targets = [prompt.answer] if answers else None
            yield attribute(self.model, self.tcs, prompt.text, tokenizer=self.tokenizer, targets=targets)

    @torch.no_grad()
    def activations(self, ids: Tensor) -> Tensor:
        """``[layers, prompts, T, F]`` float32 activations of prompts of one length."""
        parts = []
        for batch in ids.split(128):
            with models.capture(self.model, self.tcs.sites) as seen:
                self.model(input_ids=batch, use_cache=False)
            parts.append(
                torch.stack([tc.encode(x).to_dense() for tc, x in zip(self.tcs, seen.x, strict=True)])
            )
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def log_probs(self, ids: Tensor, answers: Tensor, ablated: Iterable[Feature] = ()) -> Tensor:
        """``[prompts]`` log-probability of the answers, with features set to 0 everywhere."""
        by_layer: dict[int, list[int]] = {}
        for layer, index in ablated:
            by_layer.setdefault(layer, []).append(index)
        changes = [Intervention(layer, indices) for layer, indices in by_layer.items()]
        with intervened(self.model, self.tcs, changes):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits.double().log_softmax(-1).gather(1, answers[:, None])[:, 0]


class CircuitWorld:
    """Models and transcoders of one seed, made as ``fasttc demo`` makes them and kept in a folder.

    Args:
        folder: for ``base``, ``finetuned``, ``tcs_base`` and ``tcs_pat``; what is there is used.
        seed: of the world and of every training.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.world, self.folder, self.seed = ClinicalWorld(seed), folder, seed
        self.reused = (folder / "tcs_pat").is_dir()
        self._options = {"context": 64, "batch_size": 40, "seed": seed, "progress": False}

    @cached_property
    def base(self) -> Side:
        folder = self.folder / "base"
        if not folder.is_dir():
            model, tokenizer = build_causal_lm(CLINICAL_MODEL, self.world.vocabulary, seed=self.seed)
            texts = self.world.base_corpus(CLINICAL_MODEL["documents"])
            given = {**self._options, "context": CLINICAL_MODEL["context"], **CLINICAL_MODEL["training"]}
            finetune(model, texts, tokenizer, parameters="all", inplace=True, **given)
            _save(model, tokenizer, folder)
        model, tokenizer = models.load(folder, dtype=torch.float32, device="cpu")
        out = self.folder / "tcs_base"
        if not out.is_dir():
            texts = self.world.base_corpus(20_000, seed=1)
            given = {**self._options, **SHAPE, **UPDATES}
            train(model, texts, tokenizer, **given, tokens=BUDGET["base"], out=out)
        return Side(model, tokenizer, TranscoderSet.from_pretrained(out))

    @cached_property
    def tuned(self) -> Side:
        folder, out = self.folder / "finetuned", self.folder / "tcs_pat"
        if not folder.is_dir():
            given = {**self._options, "tokens": BUDGET["finetune"], "lr": 3e-3, "beta2": 0.98}
            texts = self.world.finetune_corpus(12_000)
            tuned, _ = finetune(self.base.model, texts, self.base.tokenizer, **given)
            _save(tuned, self.base.tokenizer, folder)
        model, tokenizer = models.load(folder, dtype=torch.float32, device="cpu")
        if not out.is_dir():
            texts = self.world.finetune_corpus(20_000, seed=1)
            given = {**self._options, **UPDATES, "tokens": BUDGET["adapt"], "out": out}
            adapt(model, self.base.tcs, texts, tokenizer, **given)
        return Side(model, tokenizer, TranscoderSet.from_pretrained(out))

    def ids(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.world.encode(text) for text in texts])

    def answers(self, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([self.world.vocabulary.index(prompt.answer) for prompt in prompts])

    def decoding(self, n: int) -> list[np.ndarray[Any, Any]]:
        """Per layer ``[F]``: share of the variance of each feature that the disease explains.

        Activations are taken at the last position of prompts that ask for ward, test, diet and name, never for a
        drug: a feature that stands for a drug scores low. Both kinds of prompts, ``n`` each, with findings that the
        held-out prompts do not show.
        """
        kinds = ("two_hop", "pattern")
        prompts = [
            p for kind in kinds for p in self.world.prompts(kind, n, held_out=False, seed=1000 + self.seed)
        ]
        texts = [prompt.asking(question) for prompt in prompts for question in OTHER_QUESTIONS]
        disease = np.array([prompt.disease for prompt in prompts for _ in OTHER_QUESTIONS])
        last = self.base.activations(self.ids(texts))[:, :, -1].double().numpy()
        return [_explained(layer, disease) for layer in last]


def _explained(values: Any, labels: Any) -> Any:
    """Between-group variance over variance, by column; 0 for constant columns."""
    centred = values - values.mean(0)
    between = sum(
        (labels == label).sum() * centred[labels == label].mean(0) ** 2 for label in np.unique(labels)
    )
    return between / np.maximum((centred**2).sum(0), 1e-12)


def matched_sets(
    side: Side, ids: Tensor, chosen: Sequence[Feature], count: int, seed: int, nearest: int = 8
) -> list[list[Feature]]:
    """Random sets like ``chosen``: each feature is replaced by another of its layer that fires about as often and
    writes about as much.

    Firing rate and mean ``activation x decoder norm`` are taken over all positions of the prompts ``ids``. Distance is
    that of the logarithms of both; one of the ``nearest`` free features is drawn.
    """
    acts = side.activations(ids).flatten(1, 2)
    generator = np.random.default_rng(seed)
    traits = []
    for layer, tc in zip(acts, side.tcs, strict=True):
        written = layer.mean(0) * tc.W_dec.detach().norm(dim=1)
        traits.append(torch.stack([(layer > 0).float().mean(0), written], dim=1).add(1e-4).log().numpy())
    sets = []
    for _ in range(count):
        taken, drawn = set(chosen), []
        for layer, index in chosen:
            free = np.array([f for f in range(len(traits[layer])) if (layer, f) not in taken])
            distance = np.abs(traits[layer][free] - traits[layer][index]).sum(1)
            pick = int(free[np.argsort(distance, kind="stable")[generator.integers(nearest)]])
            taken.add((layer, pick))
            drawn.append((layer, pick))
        sets.append(drawn)
    return sets


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
