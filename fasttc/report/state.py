"""What is edited in the page: its file, which is a supernode file, and which page it belongs to.

Edits are remembered with the *origin* of the page that they were made in: a digest of what that page started with.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from fasttc._files import atomic_file, read_json
from fasttc.graph import Supernodes

State = Mapping[str, Any]


def origin(state: State | None) -> str:
    """Names a state that pages start with: 16 hexadecimal digits, the same for the same content."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def read_state(path: str | Path) -> dict[str, Any]:
    """What was edited, from a supernode file (``docs/graph-files.md``): checked, with the page's own entries.

    Raises:
        ValueError: no such file, or not a supernode file; one line with the path.
    """
    known = Supernodes.load(path).to_dict()
    return {**read_json(path), **known}


def write_state(path: str | Path, content: Any, start: str | None = None) -> None:
    """Writes what was edited as a supernode file, whole or not at all; the page's own entry, ``page``, is kept.

    Args:
        path: the file.
        content: of a supernode file.
        start: origin of the page in which it was edited, written as ``page.from``.

    Raises:
        ValueError, TypeError: not the content of a supernode file; the file is left as it was.
        OSError: the file cannot be written.
    """
    state = Supernodes.from_dict(content).to_dict()
    page = {**_page(content), **({} if start is None else {"from": start})}
    if page:
        state["page"] = page
    text = json.dumps(state, indent=1, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="ascii")


def after_merge(saved: State, merge: State) -> State:
    """``saved`` with the groups of a merge that was made since; ``saved`` itself where its own groups hold.

    They hold where they are the merge's, were edited in a page that started with this merge, or come from elsewhere
    (by hand, from ``fasttc graph merge --save-groups``). Labels, pins and the rest are kept in any case.
    """
    begun, page = _page(saved).get("from"), {**_page(saved), "from": origin(merge)}
    elsewhere = begun is None and saved["groups"]
    if elsewhere or begun == page["from"] or _groups(saved) == _groups(merge):
        return saved
    return {**saved, "groups": merge["groups"], "page": page}


def set_aside(path: str | Path) -> Path:
    """Copies a file to the first free name beside it: ``x.json`` to ``x.1.json``, whole or not at all; returns it."""
    path = Path(path)
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    free = next(name for name in names if not name.exists())
    with atomic_file(free) as temporary:
        shutil.copyfile(path, temporary)
    return free


def _page(state: State) -> dict[str, Any]:
    page = state.get("page")
    return page if isinstance(page, dict) else {}


def _groups(state: State) -> set[tuple[str, frozenset[str]]]:
    return {(group["name"], frozenset(group["members"])) for group in state["groups"]}
