"""One world as plain values and back, identity kept: how every segment of a recording begins.

Objects become a table, references to them numbers, so that depth costs no recursion and what two branches share stays
shared. Only the classes listed here are ever made from a file. What is content passes the veil on its way out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, TypeAlias

import msgspec

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.kv import node_states, token_log
from agentspeed_engine.kv.branch import Branch, Room
from agentspeed_engine.kv.branch_states import Decoding, Held, Next, Prefilling, Promoting, Queued, Settling, Then
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.pool import Pool
from agentspeed_engine.kv.tree import Node, Tree
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.kv.views import NodeRun, PageCopy, TurnSpec
from agentspeed_engine.protocol.messages import Grammar, Lease, Residence, Sampling
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.growth import Growth
from agentspeed_engine.sched.pause_model import PauseModel
from agentspeed_engine.sched.plan import HostCopy, Row, StepPlan, TokenOf
from agentspeed_engine.sched.redaction import Veil
from agentspeed_engine.sched.state import SchedulerState, Session, Ticket, Waiting

Plain: TypeAlias = list[Any]


class _Code(IntEnum):
    """What a list in a table stands for; its first item."""

    REF = 0
    LIST = 1
    TUPLE = 2
    DICT = 3
    SET = 4
    FROZEN = 5
    IDS = 6
    NUMBERS = 7
    NEXT = 8
    STRUCT = 9
    WAITING = 10


_CLASSES: Final[dict[str, type[Any]]] = {
    "World": SchedulerState,
    "Kv": KvCache,
    "Tree": Tree,
    "Pool": Pool,
    "Node": Node,
    "Branch": Branch,
    "Room": Room,
    "Log": token_log.Log,
    "_Part": token_log.Part,
    "Turn": Turn,
    "TurnSpec": TurnSpec,
    "NodeRun": NodeRun,
    "PageCopy": PageCopy,
    "Row": Row,
    "TokenOf": TokenOf,
    "StepPlan": StepPlan,
    "HostCopy": HostCopy,
    "Ticket": Ticket,
    "Session": Session,
    "PauseLaw": PauseModel,
    "Growth": Growth,
    "Held": Held,
    "Queued": Queued,
    "Promoting": Promoting,
    "Prefilling": Prefilling,
    "Decoding": Decoding,
    "Settling": Settling,
    "Then": Then,
    "Device": node_states.Device,
    "Saving": node_states.Saving,
    "Both": node_states.Both,
    "Host": node_states.Host,
    "Loading": node_states.Loading,
}
"""By the tag that a recording calls them by. A tag stays when a class is renamed: recordings outlive names."""
_STRUCTS: Final[dict[str, type[Any]]] = {
    "Lease": Lease,
    "Residence": Residence,
    "Sampling": Sampling,
    "Grammar": Grammar,
}
_TAGS: Final[dict[type[Any], str]] = {kind: tag for tags in (_CLASSES, _STRUCTS) for tag, kind in tags.items()}
_PLAIN = (int, float, str, bytes, bool, type(None))
_MANY = 16
"""Numbers in a tuple or list from which on they are packed at once."""
_WIDE = 1 << 32
_LEFT_OUT = {("World", "config"), ("World", "oracle"), ("World", "out")}
"""Handed in anew, or empty between two inputs."""
_KEYED = {("Node", "children"), ("Tree", "roots")}
"""Dicts of nodes whose keys follow from the nodes."""


def packed(world: SchedulerState, veil: Veil) -> Plain:
    """Everything the core knows, as values that msgpack carries. To be taken between two inputs."""
    if world.out or world.oracle is not None:
        raise BrokenInvariant("a world is recorded between two inputs, and without an oracle")
    return _Packer(veil).table(world)


def unpacked(table: Plain, config: CoreConfig) -> SchedulerState:
    """The world again. Raises `ValueError` when the table is not of one, or of another version of the engine."""
    try:
        world = _Unpacker(table).world()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the state it begins with cannot be built: {error!r}") from error
    world.config, world.oracle, world.out = config, None, []
    fresh = SchedulerState(config)
    for made, expected in ((world, fresh), (world.kv, fresh.kv), (world.kv.tree, fresh.kv.tree)):
        if vars(made).keys() != vars(expected).keys():
            raise ValueError(f"its {type(made).__name__} has other fields than this version's")
    return world


def fields(kind: type[Any], value: object | None = None) -> tuple[str, ...]:
    """The names of what an object of `kind` holds."""
    slots = [name for one in reversed(kind.__mro__) for name in one.__dict__.get("__slots__", ())]
    if not any("__slots__" in one.__dict__ for one in kind.__mro__[:-1]):
        return () if value is None else tuple(vars(value))
    return tuple(name for name in slots if name != "__weakref__")


class _Packer:
    """A worklist: an object's fields are packed after whatever refers to it got its number."""

    def __init__(self, veil: Veil) -> None:
        self._hide: Callable[[Any, str, Any], Any] = _as_it_is if veil.clear else _Hidden(veil)
        self._numbers: dict[int, int] = {}
        self._objects: list[Any] = []

    def table(self, world: SchedulerState) -> Plain:
        _ = self._ref(world)
        names: dict[str, tuple[str, ...]] = {}
        rows: list[Any] = []
        for value in self._objects:  # grows while it is walked
            kind = _kind(value)
            name = _TAGS.get(kind)
            if name is None:
                raise BrokenInvariant(f"{kind.__qualname__} cannot be recorded")
            if name not in names:
                names[name] = tuple(field for field in fields(kind, value) if (name, field) not in _LEFT_OUT)
            rows.append([name, *(self._field(value, field) for field in names[name])])
        return [names, rows]

    def _field(self, value: Any, name: str) -> Any:
        held = self._hide(value, name, getattr(value, name))
        if (_TAGS[_kind(value)], name) in _KEYED:
            return [self._ref(node) for node in held.values()]
        return self._value(held)

    def _ref(self, value: object) -> Plain:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return [_Code.REF, number]

    def _value(self, value: Any) -> Any:
        kind = _kind(value)
        if kind in _PLAIN:
            return value
        if kind is list or kind is tuple:
            code = _Code.LIST if kind is list else _Code.TUPLE
            if len(value) >= _MANY and all(type(item) is int and 0 <= item < _WIDE for item in value):
                return [_Code.NUMBERS, code, array("I", value).tobytes()]
            return [code, *map(self._value, value)]
        if kind is dict:
            return [_Code.DICT, *(self._value(part) for pair in value.items() for part in pair)]
        if kind is set or kind is frozenset:
            return [_Code.SET if kind is set else _Code.FROZEN, *sorted(value)]
        if kind is array or kind is bytearray:
            return [_Code.IDS, kind.__name__, bytes(value)]
        if kind is Next:
            return [_Code.NEXT, int(value)]
        if kind is Waiting:
            return [_Code.WAITING, *map(self._value, value)]
        if issubclass(kind, msgspec.Struct) and kind in _TAGS:
            values = (self._value(getattr(value, name)) for name in kind.__struct_fields__)
            return [_Code.STRUCT, _TAGS[kind], *values]
        return self._ref(value)


class _Unpacker:
    def __init__(self, table: Plain) -> None:
        self._names, self._rows = table
        for name, held in self._names.items():
            expected = fields(_CLASSES[name])
            if expected and tuple(held) != expected:
                raise ValueError(f"its {name} has other fields than this version's")
        self._objects: list[Any] = [object.__new__(_CLASSES[row[0]]) for row in self._rows]

    def world(self) -> SchedulerState:
        keyed: list[tuple[Any, str]] = []
        for made, row in zip(self._objects, self._rows, strict=True):
            for name, held in zip(self._names[row[0]], row[1:], strict=True):
                if (row[0], name) in _KEYED:
                    keyed.append((made, name))
                    object.__setattr__(made, name, [self._objects[ref[1]] for ref in held])
                else:
                    object.__setattr__(made, name, self._value(held))
        world = self._objects[0]
        if not isinstance(world, SchedulerState):
            raise ValueError("the state it begins with is not a world")
        size = world.kv.page_tokens * 4
        for made, name in keyed:
            below: list[Node] = getattr(made, name)
            keys = (node.root if name == "roots" else node.ids[:size] for node in below)
            object.__setattr__(made, name, dict(zip(keys, below, strict=True)))
        return world

    def _value(self, value: Any) -> Any:
        if _kind(value) is not list:
            return value
        code: int = value[0]
        rest: list[Any] = value[1:]
        match code:
            case _Code.REF:
                return self._objects[rest[0]]
            case _Code.LIST:
                return [self._value(item) for item in rest]
            case _Code.TUPLE:
                return tuple(self._value(item) for item in rest)
            case _Code.DICT:
                items = [self._value(item) for item in rest]
                return dict(zip(items[::2], items[1::2], strict=True))
            case _Code.SET:
                return set(rest)
            case _Code.FROZEN:
                return frozenset(rest)
            case _Code.IDS:
                return bytearray(rest[1]) if rest[0] == "bytearray" else _array("I", rest[1])
            case _Code.NUMBERS:
                numbers = _array("I", rest[1]).tolist()
                return numbers if rest[0] == _Code.LIST else tuple(numbers)
            case _Code.NEXT:
                return Next(rest[0])
            case _Code.STRUCT:
                kind = _STRUCTS[rest[0]]
                values = (self._value(item) for item in rest[1:])
                return kind(**dict(zip(kind.__struct_fields__, values, strict=True)))
            case _Code.WAITING:
                return Waiting(*(self._value(item) for item in rest))
            case _:
                raise ValueError(f"{code!r} is no code of a value")


def _kind(value: object) -> type[Any]:
    return type(value)


def _array(kind: str, data: bytes) -> array[Any]:
    made: array[Any] = array(kind)
    made.frombytes(data)
    return made


def _as_it_is(value: Any, name: str, held: Any) -> Any:
    return held


class _Hidden:
    """Replaces what is content. What only a worker needs (stop strings, grammars, messages) is left out."""

    def __init__(self, veil: Veil) -> None:
        self._veil = veil

    def __call__(self, value: Any, name: str, held: Any) -> Any:
        match value, name:
            case (Node() | Branch(), "root"):
                return self.root(held)
            case Node(), "ids":
                return self._veil.ids(held, value.start)
            case Row(), "ids":
                return self._ids(array("I", held), value.position)
            case Session() | Room(), "tenant" | "label":
                return self._veil.name(held)
            case Tree(), "owned" | "tips_of":
                return {self._veil.name(tenant): of_tenant for tenant, of_tenant in held.items()}
            case SchedulerState(), "queues" | "actives":
                return {self._veil.name(tenant): turns for tenant, turns in held.items()}
            case SchedulerState(), "tools":
                return {number: self._veil.name(tool) for number, tool in held.items()}
            case SchedulerState(), "tool_laws":
                return {self._veil.name(tool): law for tool, law in held.items()}
            case Turn(), "message":
                return ""
            case TurnSpec(), "stop_ids":
                return frozenset[int]()
            case TurnSpec(), "consumed_ids":
                return ()
            case TurnSpec(), "seen" | "counted":
                return b""
            case TurnSpec(), "sampling":
                return msgspec.structs.replace(held, logit_bias=())
            case TurnSpec(), "stop_strings":
                return tuple(bytes(len(stop)) for stop in held)
            case TurnSpec(), "grammar":
                return None if held is None else msgspec.structs.replace(held, source="")
            case _:
                return self._ids(held, value.start) if name == "ids" and _kind(value) is token_log.Part else held

    def _ids(self, ids: array[int], start: int) -> array[int]:
        return _array("I", self._veil.ids(ids.tobytes(), start))

    def root(self, key: tuple[str, str, str]) -> tuple[str, str, str]:
        """The salt is a tenant's name, then the number of a private session."""
        tenant, _, number = key[2].rpartition("\0")
        return key[0], key[1], f"{self._veil.name(tenant)}\0{number}"
