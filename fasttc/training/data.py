"""Token streams: documents split three ways, packed into blocks, in an order that a seed fixes and a state resumes."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fasttc.training.documents import Document, Exchange, digest, fingerprint, read_documents
from fasttc.training.exchanges import check_chat, encode_exchanges, encode_texts
from fasttc.training.packing import Rows, TokenBatch, cut, pack

SPLITS = ("train", "validation", "test")
_POOL_ROWS = 256
"""Rows packed and shuffled together: enough that whole documents fill them to a few per cent."""
_TOKENISE_AT_ONCE = 256


def split_documents(
    documents: Sequence[Document], fractions: Sequence[float] = (0.9, 0.05, 0.05), seed: int = 0
) -> dict[str, list[int]]:
    """Shares documents out to train, validation and test: whole documents, and equal documents together.

    Documents are ranked by a hash of their content and ``seed`` and the ranking is cut at the fractions. So the
    split does not depend on their order, a copy of a training document is never in the test set, and counts are
    exact but for such copies. Every share that is not zero gets a document if there are enough.

    Returns:
        Indices into ``documents`` by split, ascending.

    Raises:
        ValueError: fractions that are not three numbers >= 0 with sum 1.
    """
    shares = list(fractions)
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"fractions: expected train, validation, test >= 0 with sum 1, got {fractions}")
    keys = [digest(document, seed) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: (keys[i], i))
    ends = []
    for share in shares[
        2:0:-1
    ]:  # the test set is cut first: it stays when only train and validation trade places
        wanted = round(share * len(order))
        start = ends[-1] if ends else 0
        end = start + (max(1, wanted) if share > 0 and len(order) >= 3 else wanted)
        while 0 < end < len(order) and keys[order[end]] == keys[order[end - 1]]:
            end += 1
        ends.append(min(end, len(order)))
    test, validation = ends
    return {
        "train": sorted(order[validation:]),
        "validation": sorted(order[test:validation]),
        "test": sorted(order[:test]),
    }


class TokenData:
    """Documents with their split and their tokens; streams over each split.

    Tokens are computed when first needed and kept (four bytes each).

    Args:
        documents: text, token ids, or exchanges, of which only the answers are learned.
        tokenizer: a Hugging Face tokenizer, or any object whose ``encode(text)`` gives token ids. Not needed for
            token ids.
        context: T, length of a row. A longer document is cut into pieces of T tokens.
        eos_id: token put after the answer of every exchange, and learned; None puts nothing.
        chat: exchanges are put into the tokenizer's chat template, which then ends the answer in its own way.
        bos_id: token put before every document and every piece of one; None puts nothing.
        pad_id: token that fills rows.
        fractions, split_seed: see :func:`split_documents`. Keep ``split_seed`` the same for a base model, its
            fine-tuning and the adaptation, or one will be tested on what another has seen.
        vocab_size: token ids at or above it are refused.
        text: how records became the documents; for reports alone.

    Attributes:
        splits: documents by split, as of :func:`split_documents`.
        fingerprint: of all documents in their order.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Any = None,
        *,
        context: int = 128,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
        chat: bool = False,
        fractions: Sequence[float] = (0.9, 0.05, 0.05),
        split_seed: int = 0,
        vocab_size: int | None = None,
        text: str | None = None,
    ) -> None:
        if isinstance(context, bool) or not isinstance(context, int) or context < 2:
            raise ValueError(f"context: expected an int >= 2, got {context!r}")
        if not documents:
            raise ValueError("documents: expected at least one, got none")
        if isinstance(documents[0], str | Exchange) and tokenizer is None:
            raise ValueError(
                "tokenizer: expected one, since the data is text; got None (token ids need none)"
            )
        if chat:
            check_chat(documents, tokenizer)
        self.documents = documents
        self.tokenizer = tokenizer
        self.context = context
        self.bos_id = bos_id
        self.eos_id = None if chat else eos_id
        self.chat = chat
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.fractions = tuple(fractions)
        self.split_seed = split_seed
        self.text = text
        self.splits = split_documents(documents, fractions, split_seed)
        self.fingerprint = fingerprint(documents)
        self._tokens: dict[int, np.ndarray] = {}
        self._prompts: dict[int, int] = {}  # leading tokens that are not learned

    def settings(self) -> dict[str, Any]:
        """How it was read and split, by the names of :class:`fasttc.training.options.TrainingOptions`; JSON types."""
        fractions = list(self.fractions)
        return {
            "text": self.text,
            "context": self.context,
            "fractions": fractions,
            "split_seed": self.split_seed,
        }

    def identity(self) -> dict[str, str]:
        """Hashes by which the same documents, and the same split of them, are recognised again."""
        parts = repr([self.splits[name] for name in SPLITS]).encode()
        return {"data": self.fingerprint, "splits": hashlib.blake2b(parts, digest_size=16).hexdigest()}

    def indices(self, split: str) -> list[int]:
        """Documents of a split; ValueError when the name is unknown or the split is empty."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if not self.splits[split]:
            raise ValueError(
                f"expected documents for {split}, got none of {len(self.documents)}: give more documents (in a .txt "
                "file blank lines separate them) or other fractions"
            )
        return self.splits[split]

    def tokens(self, wanted: Sequence[int]) -> list[np.ndarray]:
        """Token ids of documents (int32, no BOS), tokenised together where they have not been before."""
        missing = [i for i in wanted if i not in self._tokens]
        if missing:
            for i, (ids, prompt) in zip(
                missing, self._tokenise([self.documents[i] for i in missing]), strict=True
            ):
                if prompt and prompt >= len(ids):
                    raise ValueError(f"document {i}: expected an answer of at least one token, got none")
                if self.vocab_size is not None and len(ids) and max(ids) >= self.vocab_size:
                    raise ValueError(
                        f"document {i}: expected token ids below the model's vocabulary of {self.vocab_size}, "
                        f"got {max(ids)}"
                    )
                array = np.asarray(ids, np.int32)
                starts_with_bos = self.bos_id is not None and len(array) and array[0] == self.bos_id
                self._tokens[i] = array[1:] if starts_with_bos else array
                self._prompts[i] = max(0, prompt - 1) if starts_with_bos else prompt
        return [self._tokens[i] for i in wanted]

    def _tokenise(self, documents: Sequence[Any]) -> Sequence[tuple[Any, int]]:
        """Token ids, and how many of the first are of the prompt."""
        if isinstance(documents[0], Exchange):
            return encode_exchanges(self.tokenizer, documents, chat=self.chat, eos_id=self.eos_id)
        if isinstance(documents[0], str):
            documents = encode_texts(self.tokenizer, documents)
        return [(document, 0) for document in documents]

    def rows(self, documents: Sequence[int]) -> Rows:
        """The given documents packed into rows."""
        pieces, prompts = [], []
        head = 0 if self.bos_id is None else 1
        for i, ids in zip(documents, self.tokens(documents), strict=True):
            left = self._prompts[i]
            for piece in cut(ids, self.context, self.bos_id):
                if left < len(piece) - head:  # a piece of nothing but prompt teaches nothing
                    pieces.append(piece)
                    prompts.append(head + left if left else 0)
                left = max(0, left - (len(piece) - head))
        return pack(pieces, self.context, self.pad_id, prompts)

    def stream(self, split: str, batch_size: int, *, seed: int = 0) -> "TokenStream":
        """An endless, shuffled, resumable stream of blocks [batch_size, T]."""
        return TokenStream(self, split, batch_size, seed)

    def batches(self, split: str, batch_size: int, *, max_tokens: int | None = None) -> Iterator[TokenBatch]:
        """One pass over a split in a fixed order (mixed, so that a part of it is a fair sample).

        Args:
            split: "train", "validation" or "test".
            batch_size: B; the last block may have fewer rows.
            max_tokens: stops after the block with which so many tokens have been given.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        order = np.random.default_rng(0).permutation(self.indices(split)).tolist()
        given, left = 0, None
        for pool, stop in self._pools(order):
            rows = pool.take(np.random.default_rng(0).permutation(len(pool)))
            rows = rows if left is None else Rows.join([left, rows])
            end = len(rows) if stop == len(order) else len(rows) - len(rows) % batch_size
            for start in range(0, end, batch_size):
                batch = rows.take(slice(start, start + batch_size)).batch()
                yield batch
                given += batch.n_tokens
                if max_tokens is not None and given >= max_tokens:
                    return
            left = rows.take(slice(end, None))

    def _pools(self, order: Sequence[int], start: int = 0) -> Iterator[tuple[Rows, int]]:
        """Packed pools of documents ``order[start:]``, each with the place where the next one starts."""
        while start < len(order):
            stop, total = start, 0
            while stop < len(order) and total < _POOL_ROWS * self.context:
                if stop % _TOKENISE_AT_ONCE == start % _TOKENISE_AT_ONCE:
                    self.tokens(order[stop : stop + _TOKENISE_AT_ONCE])
                total += len(self.tokens(order[stop : stop + 1])[0]) + 1
                stop += 1
            yield self.rows(order[start:stop]), stop
            start = stop


class TokenStream:
    """Endless blocks of one split. The order is a function of the seed: epoch by epoch, every document once in each.

    Documents are shuffled at the start of an epoch, taken in pools of about 256 rows, packed, and the rows of a
    pool shuffled again. A block may hold the end of one epoch and the start of the next.
    """

    def __init__(self, data: TokenData, split: str, batch_size: int, seed: int = 0) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self._documents = np.array(data.indices(split))
        self._epoch = self._pool_start = self._row = 0
        self._pool: Rows | None = None
        self._pool_stop = 0

    @property
    def epoch(self) -> int:
        """Passes over the documents that are complete."""
        return self._epoch

    def next(self) -> TokenBatch:
        parts: list[Rows] = []
        missing = self.batch_size
        while missing:
            pool = self._current_pool()
            part = pool.take(slice(self._row, self._row + missing))
            self._row += len(part)
            missing -= len(part)
            parts.append(part)
        return Rows.join(parts).batch()

    def _current_pool(self) -> Rows:
        if self._pool is not None and self._row >= len(self._pool):
            self._pool, self._row, self._pool_start = None, 0, self._pool_stop
            if self._pool_start >= len(self._documents):
                self._epoch, self._pool_start = self._epoch + 1, 0
        if self._pool is None:
            seed = [self.seed % 2**63, self._epoch]
            order = np.random.default_rng(seed).permutation(self._documents).tolist()
            rows, self._pool_stop = next(self.data._pools(order, self._pool_start))
            shuffled = np.random.default_rng([*seed, self._pool_start]).permutation(len(rows))
            self._pool = rows.take(shuffled)
        return self._pool

    def state(self) -> dict[str, int]:
        """Where the stream stands; JSON types."""
        return {"epoch": self._epoch, "pool_start": self._pool_start, "row": self._row}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to where a stream over the same data with the same seed stood when it gave ``state``."""
        self._epoch, self._pool_start, self._row = (int(state[k]) for k in ("epoch", "pool_start", "row"))
        self._pool = None


def open_data(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    chat: bool = False,
    context: int = 128,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
) -> TokenData:
    """Reads ``data`` for a model: BOS and padding from the tokenizer (or the model's configuration for token ids).

    Args:
        model: a Hugging Face causal language model; its context and vocabulary are checked against.
        data: see :func:`fasttc.training.documents.read_documents`; a :class:`TokenData` is returned as it is.
        tokenizer, context, fractions, split_seed: see :class:`TokenData`.
        text, prompt, answer: how a record becomes text, or an exchange.
        chat: see :class:`TokenData`; needs prompt and answer.

    Raises:
        ValueError: as those two do; a context beyond the model's.
    """
    if isinstance(data, TokenData):
        return data
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(f"context: expected at most the model's {limit} positions, got {context}")
    source = config if tokenizer is None else tokenizer
    bos_id = getattr(source, "bos_token_id", None)
    pad_id = getattr(source, "pad_token_id", None)
    return TokenData(
        read_documents(data, text=text, prompt=prompt, answer=answer),
        tokenizer,
        context=context,
        bos_id=bos_id,
        eos_id=getattr(source, "eos_token_id", None),
        chat=chat,
        pad_id=0 if pad_id is None else pad_id,
        fractions=fractions,
        split_seed=split_seed,
        vocab_size=getattr(config, "vocab_size", None),
        text=text,
    )
