"""Task accuracy: multiple choice by log-likelihood, free text by exact match and token F1."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttc.models import anatomy, evaluating, sample
from fasttc.training.causal import NextToken
from fasttc.training.documents import Exchange, read_records, render_fields
from fasttc.training.exchanges import check_chat, encode_exchanges
from fasttc.training.packing import NO_LABEL, TokenBatch

Normalise = Literal["bytes", "tokens", "none"]


@dataclass(frozen=True)
class Question:
    """A prompt with its right answer; with options, one of which it is, for multiple choice."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.options and self.answer not in self.options:
            raise ValueError(f"answer: expected one of {', '.join(self.options)}, got {self.answer!r}")


@dataclass(frozen=True)
class ClassCount:
    """Of one option: questions whose answer it is, how often it was chosen, how often rightly."""

    questions: int
    chosen: int
    correct: int


@dataclass(frozen=True)
class TaskReport:
    """What :func:`evaluate_task` found.

    Attributes:
        kind: "choice" or "text".
        questions: how many.
        accuracy: share answered rightly; of free text: exact matches after normalisation (SQuAD: case, punctuation,
            articles and white space do not count).
        f1: of free text: mean F1 of the answers' words; else None.
        balanced_accuracy: mean over classes of the share answered rightly; None without classes.
        majority: what always choosing the commonest answer would score; chance: what drawing an option would. None of
            free text.
        classes: by option, where all questions have the same options.
        normalise: by what the log-likelihood of an option was divided; None of free text.
        answers: what the model chose or wrote, in the order of the questions.
    """

    kind: Literal["choice", "text"]
    questions: int
    accuracy: float
    f1: float | None = None
    balanced_accuracy: float | None = None
    majority: float | None = None
    chance: float | None = None
    classes: dict[str, ClassCount] = field(default_factory=dict)
    normalise: Normalise | None = None
    answers: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"answers": list(self.answers)}


def read_questions(
    data: Any, *, prompt: str, answer: str, options: str | Sequence[str] | None = None
) -> list[Question]:
    """Questions from records.

    Args:
        data: see :func:`fasttc.training.documents.read_documents`; records with fields.
        prompt, answer: templates such as ``"{QUESTION}"``. In multiple choice the answer is an option or its number,
            from 0.
        options: for multiple choice: options of all questions, or the field that holds a record's own list of them.

    Raises:
        ValueError: as for documents; fewer than two options; an answer that is none of them; an option that is the
            answer of no question.
    """
    questions = []
    for i, record in enumerate(read_records(data)):
        where = f"task, record {i}"
        own = _options(record, options, where)
        right = render_fields(record, answer, where)
        if own and right not in own and right.isdigit() and int(right) < len(own):
            right = own[int(right)]
        if own and right not in own:
            raise ValueError(f"{where}: expected an answer among {', '.join(own)}, got {right!r}")
        if not right.strip():
            raise ValueError(f"{where}: expected an answer, got none")
        questions.append(Question(render_fields(record, prompt, where), right, own))
    if options is not None and not isinstance(options, str):
        _check_classes(questions)
    return questions


def _options(record: Any, options: str | Sequence[str] | None, where: str) -> tuple[str, ...]:
    if options is None:
        return ()
    found = options
    if isinstance(options, str):
        name = options.strip("{}")
        if not hasattr(record, "get") or not isinstance(record.get(name), list | tuple):
            raise ValueError(f"options: expected the field {name!r} of {where} to hold a list")
        found = [str(option) for option in record[name]]
    if len(set(found)) < 2 or len(set(found)) < len(found):
        raise ValueError(f"options: expected at least two different ones, got {list(found)}")
    return tuple(found)


def _check_classes(questions: Sequence[Question]) -> None:
    counts = Counter(question.answer for question in questions)
    empty = [option for option in questions[0].options if not counts[option]]
    if empty:
        seen = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        raise ValueError(
            f"task: expected questions of every class, got none for {', '.join(empty)} (of {len(questions)}: {seen})"
        )


def evaluate_task(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    normalise: Normalise = "bytes",
    chat: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> TaskReport:
    """Asks a model questions.

    Multiple choice: the option with the largest ``log p(option | prompt)``, divided by its length; the first of equals.
    Free text: the most probable token each time, up to the end-of-text token or the end of a line.
    Prompts too long for the model lose their beginning. Deterministic. Inside :func:`fasttc.replaced` the answers are
    those of the model with its MLPs replaced.

    Args:
        model: a Hugging Face causal language model of a supported family; runs in evaluation mode and is put back.
        questions: see :func:`read_questions`; all with options, or none.
        tokenizer: of the model.
        normalise: what an option's log-likelihood is divided by: its UTF-8 "bytes", its "tokens", or "none".
        chat: asks in the tokenizer's chat template.
        batch_size: sequences in one forward.
        max_new_tokens: of a free text.
        progress: shows a bar.

    Raises:
        ValueError: no questions, or some with options and some without; no tokenizer or chat template; other options
            out of range.
    """
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise: expected one of {', '.join(get_args(Normalise))}, got {normalise!r}")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    if not questions:
        raise ValueError("task: expected questions, got none")
    if len({bool(question.options) for question in questions}) > 1:
        raise ValueError("task: expected options for all questions or for none, got both")
    if tokenizer is None:
        raise ValueError("tokenizer: expected one for a task of text, got None")
    if chat:
        check_chat([Exchange(questions[0].prompt, questions[0].answer)], tokenizer)
    with evaluating(model), tqdm(total=len(questions), desc="task", disable=not progress, leave=False) as bar:
        if questions[0].options:
            return _choose(model, questions, tokenizer, normalise, chat, batch_size, bar)
        return _write(model, questions, tokenizer, chat, max_new_tokens, bar)


# --- multiple choice -------------------------------------------------------------------------------------------


def _choose(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: Any,
    normalise: Normalise,
    chat: bool,
    batch_size: int,
    bar: Any,
) -> TaskReport:
    loss = NextToken(model, each=True)
    room = anatomy(model).max_positions
    answers = []
    for question in questions:
        exchanges = [Exchange(question.prompt, option) for option in question.options]
        encoded = [
            _fit(ids, start, tokenizer, room)
            for ids, start in encode_exchanges(tokenizer, exchanges, chat=chat)
        ]
        parts = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
        scores = torch.cat([_log_likelihoods(loss, part) for part in parts])
        lengths = {
            "bytes": [len(option.encode()) for option in question.options],
            "tokens": [len(ids) - start for ids, start in encoded],
            "none": [1] * len(encoded),
        }[normalise]
        answers.append(question.options[int((scores / torch.tensor(lengths)).argmax())])
        bar.update()
    return _choice_report(questions, answers, normalise)


def _fit(ids: list[int], start: int, tokenizer: Any, room: int) -> tuple[list[int], int]:
    """With BOS in front, and without the beginning of what is too long."""
    bos = getattr(tokenizer, "bos_token_id", None)
    head = [] if bos is None else [bos]
    if head and ids[:1] == head:
        ids, start = ids[1:], start - 1
    surplus = max(0, len(ids) + len(head) - room)
    if surplus >= start + len(head):
        raise ValueError(
            f"task: expected options that leave room for a prompt in {room} positions, got a longer one"
        )
    return [*head, *ids[surplus:]], max(len(head), start - surplus + len(head))


def _log_likelihoods(loss: NextToken, encoded: Sequence[tuple[list[int], int]]) -> Tensor:
    """log p(answer | prompt) in nats of each sequence of token ids, whose answer begins at the given place; float64."""
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.zeros(len(encoded), length, dtype=torch.int64)
    labels = torch.full_like(ids, NO_LABEL)
    for row, (tokens, start) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        first = max(start, 1)  # the first token of all follows nothing and has no probability
        labels[row, first - 1 : len(tokens) - 1] = ids[row, first : len(tokens)]
    positions = torch.arange(length).expand_as(ids)
    with torch.no_grad():
        losses, _ = loss(TokenBatch(ids, positions, labels, labels != NO_LABEL, ids.numel()))
    rows = (labels != NO_LABEL).nonzero()[:, 0]
    return -torch.zeros(len(encoded), dtype=torch.float64).index_add(0, rows, losses.double().cpu())


def _choice_report(questions: Sequence[Question], answers: Sequence[str], normalise: Normalise) -> TaskReport:
    right = [question.answer == answer for question, answer in zip(questions, answers, strict=True)]
    classes = {}
    if len({question.options for question in questions}) == 1:
        asked = Counter(question.answer for question in questions)
        chosen = Counter(answers)
        correct = Counter(answer for answer, good in zip(answers, right, strict=True) if good)
        classes = {o: ClassCount(asked[o], chosen[o], correct[o]) for o in questions[0].options}
    shares = [count.correct / count.questions for count in classes.values() if count.questions]
    places = Counter(question.options.index(question.answer) for question in questions)
    return TaskReport(
        kind="choice",
        questions=len(questions),
        accuracy=sum(right) / len(right),
        balanced_accuracy=sum(shares) / len(shares) if shares else None,
        majority=max(places.values()) / len(questions),
        chance=sum(1 / len(question.options) for question in questions) / len(questions),
        classes=classes,
        normalise=normalise,
        answers=tuple(answers),
    )


# --- free text -------------------------------------------------------------------------------------------------


def _write(
    model: nn.Module, questions: Sequence[Question], tokenizer: Any, chat: bool, max_new_tokens: int, bar: Any
) -> TaskReport:
    room = anatomy(model).max_positions
    if max_new_tokens >= room:
        raise ValueError(
            f"max_new_tokens: expected fewer than the model's {room} positions, got {max_new_tokens}"
        )
    answers, exact, f1 = [], [], []
    for question in questions:
        prompt = question_ids(question, tokenizer, room - max_new_tokens, chat=chat)
        limit = len(prompt) + max_new_tokens
        eos = getattr(tokenizer, "eos_token_id", None)
        (written,) = sample(model, prompt, max_tokens=limit, temperature=0, eos_id=eos)
        text = tokenizer.decode(written[len(prompt) :], skip_special_tokens=True).strip()
        answers.append(text.splitlines()[0] if text else "")
        exact.append(_words(answers[-1]) == _words(question.answer))
        f1.append(token_f1(answers[-1], question.answer))
        bar.update()
    n = len(questions)
    return TaskReport("text", n, sum(exact) / n, f1=sum(f1) / n, answers=tuple(answers))


def question_ids(question: Question, tokenizer: Any, room: int, *, chat: bool = False) -> list[int]:
    """A question's prompt as token ids, BOS in front where there is one; its beginning is lost beyond ``room``."""
    ((ids, start),) = encode_exchanges(tokenizer, [Exchange(question.prompt, question.answer)], chat=chat)
    prompt, _ = _fit(ids[:start], start, tokenizer, room)
    return prompt


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of the shares of either's words that are in the other, repeats counted (SQuAD)."""
    one, two = _words(text), _words(reference)
    if not one or not two:
        return float(one == two)
    common = sum((Counter(one) & Counter(two)).values())
    return 2 * common / (len(one) + len(two))


def _words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
