"""Documents: what a file, a data set or a list becomes before it is split and packed. Text, token ids or exchanges."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer that is to be learned after it."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Both as one text: a space between them where neither side has white space."""
        touching = self.prompt and not self.prompt[-1].isspace() and not self.answer[:1].isspace()
        return f"{self.prompt}{' ' if touching else ''}{self.answer}"


Document = str | Sequence[int] | Exchange

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_TEXT_FIELD = "text"
_ID_FIELDS = ("input_ids", "token_ids")


def read_documents(
    data: Any, *, text: str | None = None, prompt: str | None = None, answer: str | None = None
) -> list[Document]:
    """Reads documents, one per record, in the order of the source; records without text are left out.

    Args:
        data: one of

            * a ``.txt`` file (UTF-8; documents are separated by blank lines),
            * a ``.jsonl`` file (one record per line), a ``.json`` file (a list of records, or an object whose
              values are the records), a ``.parquet`` file (one record per row; needs pyarrow),
            * the id of a data set on the hub, ``name[:split]`` with split "train" unless said (needs datasets),
            * records in memory: a list of strings, of token-id lists, of dicts, or a ``datasets.Dataset``.

            A record is a string, a list of token ids, or an object with fields.
        text: how an object becomes text, for example ``"{QUESTION} {LONG_ANSWER}"``: fields in braces, lists
            joined by a space, null as nothing. None takes the field ``text``, or ``input_ids`` as token ids.
        prompt, answer: two such templates instead of ``text``: every record becomes an :class:`Exchange`. One without
            an answer is left out.

    Raises:
        ValueError: one of prompt and answer without the other, or beside text; no such file, empty or binary file,
            unknown ending, no text in the records, or a field that the records do not have (with the fields they
            have). One line each.
    """
    name = str(data) if isinstance(data, str | Path) else f"the given {type(data).__name__}"
    records = read_records(data)
    _check_templates(text, prompt, answer)
    documents: list[Document] = []
    for i, record in enumerate(records):
        where = f"{name}, record {i}"
        if prompt is None or answer is None:
            documents.append(_render(record, text, where))
        else:
            documents.append(Exchange(*(render_fields(record, part, where) for part in (prompt, answer))))
    kept = [document for document in documents if not _is_blank(document)]
    if not kept:
        raise ValueError(f"expected documents with text, found none in {name} ({len(documents)} records)")
    if any(isinstance(document, str) != isinstance(kept[0], str) for document in kept):
        raise ValueError(f"expected records of one kind in {name}, got both text and token ids")
    return kept


def _check_templates(text: str | None, prompt: str | None, answer: str | None) -> None:
    if (prompt is None) != (answer is None):
        raise ValueError(f"prompt, answer: expected both or neither, got {prompt!r} and {answer!r}")
    if text is not None and prompt is not None:
        raise ValueError(f"text: expected none beside prompt and answer, got {text!r}")


def digest(document: Document, salt: int = 0) -> bytes:
    """A 16-byte BLAKE2b hash of a document's content: the same on every machine and run.

    That of an exchange is that of its text: both fall into the same split.
    """
    document = document.text if isinstance(document, Exchange) else document
    if isinstance(document, str):
        content = b"t" + document.encode("utf-8", "surrogatepass")
    else:
        content = b"i" + array("q", document).tobytes()
    return hashlib.blake2b(content, digest_size=16, salt=salt.to_bytes(8, "little", signed=True)).digest()


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash over all documents in their order, to recognise the same data again."""
    whole = hashlib.blake2b(digest_size=16)
    for document in documents:
        whole.update(digest(document))
    return whole.hexdigest()


def read_records(data: Any) -> Iterable[Any]:
    """The records of a source, as they are; see :func:`read_documents`."""
    if isinstance(data, Mapping):
        raise ValueError(
            "data: expected a file, a data set id or a list of records, got a dict; pass its values as a list"
        )
    if not isinstance(data, str | Path):
        if not (hasattr(data, "__iter__") and hasattr(data, "__len__")):
            raise TypeError(f"data: expected a file, a data set id or a list, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError("data: expected documents, got an empty list")
        return data
    path = Path(data)
    if path.is_dir():
        raise ValueError(f"data: expected a file or a data set id, got the folder {path}")
    if path.is_file():
        return _read_file(path)
    if path.suffix in FORMATS or isinstance(data, Path):
        raise ValueError(f"data: no such file: {path}")
    return _read_dataset(str(data))


def _read_file(path: Path) -> Iterable[Any]:
    if path.suffix not in FORMATS:
        raise ValueError(
            f"data: expected a file ending in {', '.join(FORMATS)}, got {path.name} "
            f"(ending {path.suffix or 'missing'!r})"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"data: expected documents, {path} is empty")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    content = _read_utf8(path)
    if path.suffix == ".txt":
        return _split_blank_lines(content)
    if path.suffix == ".jsonl":
        return [_parse_line(line, path, i) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    return _parse_json(content, path)


def _read_utf8(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"data: expected UTF-8 text, {path} is binary (a zero byte at {raw.index(0)})")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: expected UTF-8 text, {path} is binary or in another encoding (byte {error.start})"
        ) from None


def _split_blank_lines(content: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in content.split("\n"):
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents if lines]


def _parse_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: expected JSON on every line, {path} line {number}: {error}") from None


def _parse_json(content: str, path: Path) -> list[Any]:
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: expected JSON, {path} is not: {error}") from None
    if isinstance(parsed, dict) and all(isinstance(value, dict | str) for value in parsed.values()):
        parsed = list(parsed.values())
    if not isinstance(parsed, list):
        raise ValueError(
            f"data: expected a list of records or an object of records in {path}, got "
            + (
                f"an object with the fields {sorted(parsed)}"
                if isinstance(parsed, dict)
                else repr(parsed)[:40]
            )
        )
    return parsed


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'fasttc[data]'") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"data: expected a parquet file, {path} is not: {error}".splitlines()[0]) from None


def _read_dataset(reference: str) -> Iterable[Any]:
    name, _, split = reference.partition(":")
    if Path(name).suffix and "/" not in name:
        raise ValueError(f"data: no such file: {reference} (known endings: {', '.join(FORMATS)})")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data: {reference!r} is not a file; to read it as a data set id: pip install 'fasttc[data]'"
        ) from None
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds; all mean that the data cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data: {reference!r} is neither a file nor a readable data set: {reason}"
        ) from error


def _render(record: Any, template: str | None, where: str) -> Document:
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        return _render_object(record, template, where)
    if hasattr(record, "tolist"):  # a tensor or an array of token ids
        record = record.tolist()
    if isinstance(record, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in record):
        if any(i < 0 for i in record):
            raise ValueError(f"{where}: expected token ids >= 0, got {min(record)}")
        return array("q", record)
    raise ValueError(
        f"{where}: expected text, token ids or an object with fields, got {type(record).__name__}"
    )


def _render_object(record: Mapping[str, Any], template: str | None, where: str) -> Document:
    if template is None:
        for field in _ID_FIELDS:
            if field in record and _TEXT_FIELD not in record:
                return _render(record[field], None, where)
        template = "{" + _TEXT_FIELD + "}"
    return render_fields(record, template, where)


def render_fields(record: Any, template: str, where: str) -> str:
    """A template with fields in braces filled from a record; ``where`` says in errors which record it is.

    Raises:
        ValueError: a field that is not there, or is neither text nor a list of texts; a record without fields.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where}: expected an object with fields for {template!r}, got {type(record).__name__}"
        )
    pieces = []
    for literal, field, _, _ in _parse_template(template):
        pieces.append(literal)
        if field is None:
            continue
        if field not in record:
            have = ", ".join(map(str, record)) or "no fields"
            raise ValueError(f"text: expected the field {field!r} in {where}; it has {have}")
        pieces.append(_as_text(record[field], field, where))
    return "".join(pieces)


def _parse_template(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"text: expected fields in braces, got {template!r}: {error}") from None


def _as_text(value: Any, field: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Sequence):
        return " ".join(_as_text(item, field, where) for item in value)
    raise ValueError(
        f"text: expected text or a list in the field {field!r} of {where}, got {type(value).__name__}"
    )


def _is_blank(document: Document) -> bool:
    if isinstance(document, Exchange):
        return not document.answer.strip()
    return not document.strip() if isinstance(document, str) else len(document) == 0
