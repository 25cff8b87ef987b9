"""The models, texts and base transcoders of the adaptation ledger: stories260K and PubMedQA.

*Coverage*: the base's transcoders were trained on the base model over its own samples and the medical training
documents ("covered"), or over its samples alone ("uncovered"). *Distance*: 100 steps of FTFA at 1e-4 ("mild"), or one
pass at 1e-3 ("severe"). *Quality*: how many tokens the base's transcoders were trained on.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fasttc import models
from fasttc._files import atomic_file
from fasttc.nn import TranscoderSet
from fasttc.training import TokenData, finetune, open_data, train
from fasttc.training.activations import RememberedSource, Source, activation_source
from fasttc.training.scratch import default_lr

TEXT = "{QUESTION} {CONTEXTS} {LONG_ANSWER}"
CONTEXT, ROWS = 128, 8
BLOCK = CONTEXT * ROWS
BASE_OPTIONS = {"update_tokens": 256, "refit": "last", "seed": 0, "validation_tokens": 8192}
BASE_RATE = 0.5  # times the default: the runs are long


@dataclass(frozen=True)
class Size:
    """How large a ledger is.

    Attributes:
        samples: of the base model, 256 tokens each.
        qualities: name -> tokens that the base's transcoders are trained on.
        distances: name -> (tokens, learning rate) of FTFA.
    """

    samples: int
    qualities: dict[str, int]
    distances: dict[str, tuple[int, float]]


class World:
    """Everything the runs of a ledger start from, made once and kept in a folder.

    Args:
        data: folder with ``models/stories260K`` and ``pubmedqa/ori_pqal.json``.
        folder: for what is made.
        size: see :class:`Size`.
        n_features, k: of every transcoder.
    """

    def __init__(self, data: Path, folder: Path, size: Size, *, n_features: int = 1024, k: int = 16) -> None:
        self.folder, self.size, self.n_features, self.k = folder, size, n_features, k
        self._data = data
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base(self) -> tuple[Any, Any]:
        return models.load(self._data / "models/stories260K", dtype=torch.float32, device="cpu")

    @cached_property
    def medical(self) -> TokenData:
        """PubMedQA, split by document."""
        model, tokenizer = self.base
        return open_data(
            model, str(self._data / "pubmedqa/ori_pqal.json"), tokenizer, text=TEXT, context=CONTEXT
        )

    def tuned(self, distance: str) -> Any:
        """The fine-tuned model."""
        path = self.folder / f"ft_{distance}"
        if not path.is_dir():
            tokens, lr = self.size.distances[distance]
            finetune(*self._with_medical(), tokens=tokens, lr=lr, progress=False, out=path, resume="auto")
        return models.load(path, dtype=torch.float32, device="cpu")[0]

    def _with_medical(self) -> tuple[Any, TokenData, Any]:
        model, tokenizer = self.base
        return model, self.medical, tokenizer

    def bases(self, coverage: str, quality: str) -> TranscoderSet:
        """Transcoders of the base model: one set, as one is given in practice."""
        path = self.folder / f"base_{coverage}_{quality}_F{self.n_features}"
        if not path.is_dir():
            train(
                self.base[0],
                self._base_text(coverage),
                n_features=self.n_features,
                k=self.k,
                tokens=self.size.qualities[quality],
                lr=BASE_RATE * default_lr(self.base[0].config.hidden_size),
                **BASE_OPTIONS,
                progress=False,
                out=path,
                resume="auto",
            )
        return TranscoderSet.from_pretrained(path)

    def _base_text(self, coverage: str) -> TokenData:
        """Samples of the base model, and with "covered" the medical documents of the training split, no others."""
        documents = list(self._samples())
        if coverage == "covered":
            documents += [ids.tolist() for ids in self.medical.tokens(self.medical.indices("train"))]
        elif coverage != "uncovered":
            raise ValueError(f"coverage: expected covered or uncovered, got {coverage!r}")
        text = self.medical
        return TokenData(
            documents, context=CONTEXT, bos_id=text.bos_id, pad_id=text.pad_id, vocab_size=text.vocab_size
        )

    def _samples(self) -> list[list[int]]:
        path = self.folder / "samples.json"
        if not path.is_file():
            model, tokenizer = self.base
            ids = models.sample(
                model,
                [tokenizer.bos_token_id],
                n=self.size.samples,
                max_tokens=256,
                batch_size=250,
                eos_id=tokenizer.eos_token_id,
            )
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(ids), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def activations(
        self, model: Any, wrap: Callable[[Source], Source] = lambda source: source
    ) -> Iterator[RememberedSource]:
        """A source that runs ``model`` once over every document, however many runs read it.

        Args:
            model: the base or a fine-tuned one.
            wrap: changes what is read before it is remembered.
        """
        with activation_source(model, models.default_sites(model)) as source:
            yield RememberedSource(wrap(source))
