"""Packing: documents of any length become rows of exactly T tokens, whole documents wherever they fit."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100
"""The label of a position that predicts nothing; what ``torch.nn.functional.cross_entropy`` ignores."""


@dataclass(frozen=True)
class TokenBatch:
    """A block of packed documents.

    Several documents may share a row. ``position_ids`` start at 0 with each of them, and transformers (from 4.53)
    reads that as a block-diagonal attention mask: no document sees its neighbour, so a row holds exactly what each
    document would be alone. Pass both to the model, and neither ``attention_mask`` nor a cache.

    Attributes:
        input_ids: [B, T] int64.
        position_ids: [B, T] int64, place of a token in its document.
        labels: [B, T] int64, the next token of the same document, or -100 (also where the next token is still of a
            prompt). Already shifted: compare with ``logits[b, t]``.
        mask: [B, T] bool, the positions transcoders learn from: no padding, and not the first of a document
            (BOS, where it exists; an outlier in every model either way).
        n_tokens: positions that are not padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor
    n_tokens: int

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.labels.to(device),
            self.mask.to(device),
            self.n_tokens,
        )

    def take(self, rows: slice) -> "TokenBatch":
        """Some of the rows. ``n_tokens`` stays that of the whole block."""
        ids, positions, labels, mask = (
            t[rows] for t in (self.input_ids, self.position_ids, self.labels, self.mask)
        )
        return TokenBatch(ids, positions, labels, mask, self.n_tokens)

    @property
    def model_inputs(self) -> dict[str, Tensor | bool]:
        """Keyword arguments for a Hugging Face model."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


@dataclass(frozen=True)
class Rows:
    """Packed rows: ``ids`` and ``positions`` [R, T] int64; bool [R, T]: ``real`` (False is padding), ``learned``."""

    ids: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: slice | np.ndarray) -> "Rows":
        return Rows(self.ids[rows], self.positions[rows], self.real[rows], self.learned[rows])

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        names = ("ids", "positions", "real", "learned")
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def batch(self) -> TokenBatch:
        labels = np.full_like(self.ids, NO_LABEL)
        follows = self.learned[:, 1:] & (self.positions[:, 1:] == self.positions[:, :-1] + 1)
        labels[:, :-1][follows] = self.ids[:, 1:][follows]
        mask = self.real & (self.positions > 0)
        ids, positions, label, kept = map(torch.from_numpy, (self.ids, self.positions, labels, mask))
        return TokenBatch(ids, positions, label, kept, int(self.real.sum()))


def cut(tokens: np.ndarray, context: int, bos_id: int | None) -> list[np.ndarray]:
    """Pieces of at most ``context`` tokens; every piece starts with BOS, where there is one."""
    head = np.empty(0, tokens.dtype) if bos_id is None else np.array([bos_id], tokens.dtype)
    step = context - len(head)
    return [np.concatenate([head, tokens[i : i + step]]) for i in range(0, len(tokens), step)]


def pack(
    pieces: Sequence[np.ndarray], context: int, pad_id: int, prompts: Sequence[int] | None = None
) -> Rows:
    """Best-fit decreasing: the longest piece first, each into the fullest row that still has room for it.

    Deterministic. Padding only fills what no piece fits into. ``prompts`` says how many of the first tokens of every
    piece are not to be learned; none, unless given.
    """
    prompts = [0] * len(pieces) if prompts is None else prompts
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
    contents: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in order:
        length = len(pieces[i])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = context, len(contents)
            contents.append([])
        contents[row].append(i)
        if left > length:
            insort(room, (left - length, row))
    ids = np.full((len(contents), context), pad_id, np.int64)
    positions = np.zeros((len(contents), context), np.int64)
    real = np.zeros((len(contents), context), bool)
    learned = np.zeros_like(real)
    count = np.arange(context)
    for row, members in enumerate(contents):
        start = 0
        for i in members:
            stop = start + len(pieces[i])
            ids[row, start:stop] = pieces[i]
            positions[row, start:stop] = count[: stop - start]
            learned[row, start + prompts[i] : stop] = True
            start = stop
        real[row, :start] = True
        positions[row, start:] = count[: context - start]
    return Rows(ids, positions, real, learned)
