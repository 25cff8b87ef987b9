"""What a reader made of a graph: groups of nodes, labels, pinned nodes, and the file they are kept in.

The file (``docs/graph-files.md``) is written and read here, by ``fasttc graph merge`` and by the page alike. Nodes are
named by their ids (``node_ids``), which are the same in every graph of a prompt: a file can be applied to another one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fasttc._files import atomic_file, read_json

SCHEMA = "fasttc.supernodes/1"


@dataclass(frozen=True)
class Supernodes:
    """Groups, labels and pins, by node id.

    Attributes:
        groups: name -> members, in order. Names and members are not empty, names differ, no node is in two groups.
        labels: node id -> text. Text is data: it may hold anything, markup included.
        pinned: ids of nodes that a view keeps in sight, without duplicates.

    Raises:
        ValueError: a rule above is broken.
        TypeError: a name, an id or a label that is not a string.
    """

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for name, members in self.groups.items():
            _strings("groups", [name, *members])
            if not name.strip() or not members:
                raise ValueError(f"groups: expected a name and at least one member, got {name!r}: {members}")
            for member in members:
                if member in owner:
                    raise ValueError(
                        f"groups: expected every node in one group, got {member!r} in {owner[member]!r} and {name!r}"
                    )
                owner[member] = name
        _strings("labels", [*self.labels.keys(), *self.labels.values()])
        _strings("pinned", self.pinned)
        if len(set(self.pinned)) < len(self.pinned):
            raise ValueError("pinned: expected every id once, got duplicates")

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all. ``<`` is escaped: no string can end a script element."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=True).replace("<", "\\u003c")
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file.

        Raises:
            ValueError: no such file, not JSON, another schema or broken content; one line with the path.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: expected a supernode file, there is no file of that name")
        content = read_json(path)
        try:
            return cls.from_dict(content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The object that the file holds."""
        groups = [{"name": name, "members": list(members)} for name, members in self.groups.items()]
        return {"schema": SCHEMA, "groups": groups, "labels": self.labels, "pinned": list(self.pinned)}

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """From the object that a file holds. Entries that this version does not know are left alone.

        Raises:
            ValueError: another schema, a wrong type, or a rule of the class is broken.
        """
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"schema: expected {SCHEMA!r}, got {found!r}")
        groups: dict[str, tuple[str, ...]] = {}
        for group in _entry(content, "groups", list):
            if not isinstance(group, dict) or not isinstance(group.get("members"), list):
                raise ValueError(f'groups: expected {{"name": ..., "members": [...]}}, got {group!r}')
            name: Any = group.get("name")
            if name in groups:
                raise ValueError(f"groups: expected every name once, got {name!r} twice")
            groups[name] = tuple(group["members"])
        labels, pinned = _entry(content, "labels", dict), _entry(content, "pinned", list)
        return cls(groups=groups, labels=dict(labels), pinned=tuple(pinned))

    @classmethod
    def from_q_params(cls, q_params: Mapping[str, Any]) -> Self:
        """From the viewer state of a graph JSON (``supernodes``: ``[[name, id, ...], ...]``, and ``pinnedIds``), ids as
        they are.

        The viewers allow what the file does not: a repeated name gets `` (2)``, a node stays in its first group, and
        groups that are left empty go.
        """
        groups: dict[str, tuple[str, ...]] = {}
        seen: set[str] = set()
        for name, *members in q_params.get("supernodes") or []:
            name, copies = str(name).strip() or "group", 1
            unique = name
            while unique in groups:
                copies += 1
                unique = f"{name} ({copies})"
            own = tuple(dict.fromkeys(member for member in map(str, members) if member not in seen))
            if own:
                groups[unique] = own
                seen.update(own)
        return cls(groups=groups, pinned=tuple(dict.fromkeys(map(str, q_params.get("pinnedIds") or []))))

    def to_q_params(self) -> dict[str, Any]:
        """``pinnedIds`` and ``supernodes`` of a graph JSON. The viewers draw a supernode only if it is pinned."""
        supernodes = [[name, *members] for name, members in self.groups.items()]
        members = [member for group in self.groups.values() for member in group]
        return {"pinnedIds": list(dict.fromkeys([*self.pinned, *members])), "supernodes": supernodes}


def _entry(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name, kind())
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    return value


def _strings(name: str, values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected strings, got {value!r}")
