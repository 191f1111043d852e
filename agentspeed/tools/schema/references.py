"""Where the references of a schema lead: base addresses, anchors and pointers, all within the one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urldefrag, urljoin

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.schema.values import Json, Schema

MAX_DEPTH: Final = 200
MAX_PARTS: Final = 200_000
_MAX_DIGITS: Final = 4000
_NO_SCHEMAS: Final = frozenset({"enum", "const", "default", "examples", "example"})
_BEFORE_SIBLINGS: Final = ("draft-03", "draft-04", "draft-05", "draft-06", "draft-07")


@dataclass(frozen=True, slots=True)
class Place:
    """A schema and the address that references in it are relative to."""

    schema: Json
    base: str


class Document:
    """One schema with all it holds; checked to be JSON of a size that can be worked with."""

    def __init__(self, root: Schema) -> None:
        _check_size(root)
        declared = root.get("$schema")
        self.root = root
        self.lone_references = isinstance(declared, str) and any(one in declared for one in _BEFORE_SIBLINGS)
        """Up to draft 7 nothing counts that stands beside a `$ref`."""
        self._bases: dict[int, str] = {}
        self._resources: dict[str, Json] = {}
        self._anchors: dict[tuple[str, str], Json] = {}
        self._resources[""] = root
        self._scan()

    def place(self, schema: Json, base: str) -> Place:
        """The schema as it stands somewhere under `base`; an `$id` of its own moves it."""
        return Place(schema, self._bases.get(id(schema), base))

    def target(self, reference: str, base: str) -> Place | None:
        """What a reference leads to; None when that is not in this document."""
        try:
            address, fragment = urldefrag(base + reference if reference[:1] == "#" else urljoin(base, reference))
            pointer = unquote(fragment, errors="strict")
        except ValueError:
            return None
        if not fragment or pointer.startswith("/"):
            found = self._resources.get(address, None if address else self.root)
            if found is None:
                return None
            return self._walk(found, address, pointer)
        anchored = self._anchors.get((address, pointer))
        return None if anchored is None else self.place(anchored, address)

    def _walk(self, found: Json, base: str, pointer: str) -> Place | None:
        base = self._bases.get(id(found), base)
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isascii() and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return None
            base = self._bases.get(id(found), base)
        return Place(found, base)

    def _scan(self) -> None:
        waiting: list[tuple[Json, str]] = [(self.root, "")]
        while waiting:
            schema, base = waiting.pop()
            if isinstance(schema, list):
                waiting += [(item, base) for item in schema]
            if not isinstance(schema, dict):
                continue
            for key in ("$id", "id"):
                given = schema.get(key)
                if isinstance(given, str) and not (key == "id" and not self.lone_references):
                    base = self._identify(schema, given, base)
                    break
            for key in ("$anchor", "$dynamicAnchor"):
                anchor = schema.get(key)
                if isinstance(anchor, str):
                    _ = self._anchors.setdefault((base, anchor), schema)
            self._bases[id(schema)] = base
            waiting += [(value, base) for key, value in schema.items() if key not in _NO_SCHEMAS]

    def _identify(self, schema: Schema, given: str, base: str) -> str:
        try:
            address, fragment = urldefrag(urljoin(base, given))
        except ValueError:
            return base
        if fragment:
            _ = self._anchors.setdefault((address, fragment), schema)
            return base
        _ = self._resources.setdefault(address, schema)
        return address


def _check_size(root: Json) -> None:
    """Raises `SchemaUnsupported` for what is too deep or too large, is no JSON, or holds itself."""
    waiting: list[tuple[Json, int]] = [(root, 0)]
    parts = 0
    while waiting:
        value, depth = waiting.pop()
        parts += 1
        if depth > MAX_DEPTH or parts > MAX_PARTS:
            what = f"nests more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"has more than {MAX_PARTS} parts"
            raise SchemaUnsupported(f"The schema {what}.", remedy="Split it, or say less of it.")
        match value:
            case dict():
                if not all(isinstance(name, str) for name in value):
                    raise SchemaUnsupported("The schema has a key that is not a text.", remedy="Write JSON.")
                waiting += [(item, depth + 1) for item in value.values()]
                waiting += [(name, depth + 1) for name in value]
            case list():
                waiting += [(item, depth + 1) for item in value]
            case str():
                _check_text(value)
            case bool() | None:
                pass
            case int():
                if abs(value) >= 10**_MAX_DIGITS:
                    raise SchemaUnsupported(
                        f"The schema has a number of more than {_MAX_DIGITS} digits.", remedy="Write a smaller one."
                    )
            case float():
                if value != value or abs(value) == float("inf"):
                    raise SchemaUnsupported(f"The schema has {value}, which is not JSON.", remedy="Write a number.")
            case _:
                raise SchemaUnsupported(f"The schema has a {type(value).__name__}, which is not JSON.",
                                        remedy="Write dicts, lists, texts, numbers, booleans and None.")  # fmt: skip


def _check_text(text: str) -> None:
    try:
        _ = text.encode()
    except UnicodeEncodeError as error:
        raise SchemaUnsupported(
            f"The schema has the text {text!r}, which is no Unicode.", remedy="Leave out the lone surrogate."
        ) from error
