"""Cheap copies of a whole core, and a canonical key of what it is: what exhaustive search needs from the first day.

Values that never change (plans, rows, specs, wire messages) are shared between copies; everything else is copied
field by field, with identity kept inside one copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, cast

from agentspeed_engine.ids import BranchId, NodeId
from agentspeed_engine.kv.branch_states import Decoding, Held, Next, Prefilling, Promoting, Settling, Then
from agentspeed_engine.kv.tree import Node
from agentspeed_engine.kv.views import NodeRun, PageCopy, TurnSpec
from agentspeed_engine.protocol.messages import Lease, Residence
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.plan import HostCopy, Row, StepPlan, TokenOf
from agentspeed_engine.sched.state import SchedulerState, Ticket, Waiting

_FROZEN: frozenset[type[Any]] = frozenset(
    {
        NodeRun,
        TurnSpec,
        PageCopy,
        StepPlan,
        Row,
        TokenOf,
        HostCopy,
        CoreConfig,
        Then,
        Waiting,
        Lease,
        Residence,
        Next,
        Ticket,
    }
)
_SAME: frozenset[type[Any]] = _FROZEN | {int, float, str, bytes, bool, type(None), frozenset}
"""Values that never change."""
_Memo: TypeAlias = dict[int, Any]
_Copier: TypeAlias = Callable[[Any, _Memo], Any]


def copied(world: SchedulerState) -> SchedulerState:
    """A world that shares nothing changeable with `world`."""
    copy: SchedulerState = _COPIERS[SchedulerState](world, {})
    return copy


class _Copiers(dict[type[Any], _Copier]):
    """How values of a class are copied. Of classes that are none of the built-in ones it is found out once."""

    def __missing__(self, kind: type[Any]) -> _Copier:
        if kind in _FROZEN or not kind.__module__.startswith("agentspeed_engine."):
            self[kind] = _same  # also an immutable struct of the wire
        else:
            self[kind] = _field_by_field(kind)
        return self[kind]


def _field_by_field(kind: type[Any]) -> _Copier:
    """A function whose text names every field: a search copies ten million worlds, and most of its time was the loop
    over the names."""
    slots = [name for one in kind.__mro__ for name in one.__dict__.get("__slots__", ()) if name != "__weakref__"]
    lines = [
        "def copy(value, memo):",
        "    made = memo.get(id(value))",
        "    if made is not None:",
        "        return made",
        "    made = memo[id(value)] = new(kind)",
    ]
    if slots:
        for name in slots:
            lines += [f"    item = value.{name}", f"    made.{name} = {_COPY_OF_ITEM}"]
    else:
        lines += [f"    made.__dict__ = {{name: {_COPY_OF_ITEM} for name, item in value.__dict__.items()}}"]
    scope: dict[str, Any] = {"new": object.__new__, "kind": kind, "same": _SAME, "copiers": _COPIERS}
    exec("\n".join([*lines, "    return made"]), scope)
    return cast(_Copier, scope["copy"])


_COPY_OF_ITEM = "item if type(item) in same else copiers[type(item)](item, memo)"


def _same(value: Any, memo: _Memo) -> Any:
    return value


def _copy_tuple(value: tuple[Any, ...], memo: _Memo) -> Any:
    if _SAME.issuperset(map(type, value)):
        return value
    return tuple([item if type(item) in _SAME else _COPIERS[type(item)](item, memo) for item in value])


def _copy_list(value: list[Any], memo: _Memo) -> Any:
    made: list[Any] | None = memo.get(id(value))
    if made is None:
        made = memo[id(value)] = value[:]
        if value and type(value[0]) is not float and not _SAME.issuperset(map(type, value)):
            made[:] = [item if type(item) in _SAME else _COPIERS[type(item)](item, memo) for item in value]
    return made


def _copy_dict(value: dict[Any, Any], memo: _Memo) -> Any:
    made: dict[Any, Any] | None = memo.get(id(value))
    if made is None:
        made = memo[id(value)] = value.copy()
        if not _SAME.issuperset(map(type, value.values())):
            for name, item in value.items():
                if type(item) not in _SAME:
                    made[name] = _COPIERS[type(item)](item, memo)
    return made


def _copy_ids(value: set[Any] | array[Any] | bytearray, memo: _Memo) -> Any:
    """A copy of a container of plain ids."""
    made = memo.get(id(value))
    if made is None:
        made = memo[id(value)] = value.copy() if isinstance(value, set) else value[:]
    return made


_COPIERS = _Copiers(
    dict.fromkeys(_SAME, _same)
    | {
        tuple: _copy_tuple,
        list: _copy_list,
        dict: _copy_dict,
        set: _copy_ids,
        array: _copy_ids,
        bytearray: _copy_ids,
    }
)


def key(world: SchedulerState) -> Hashable:
    """Equal for worlds that behave alike while time stands still: of pages, nodes, turns and steps the numbers are
    forgotten and their order is kept; of clocks, and of the pauses learnt, there is nothing."""
    branches = sorted(world.states)
    settling = [state for state in world.states.values() if isinstance(state, Settling)]
    unborn = [child for state in settling for child in state.then.children]
    index = {number: place for place, number in enumerate(sorted([*branches, *unborn]))}
    ages = {state.turn.age for state in world.states.values() if not isinstance(state, Held)}
    ages |= {session.place for session in world.sessions.values() if session.turns_in_place}
    rank = {age: place for place, age in enumerate(sorted(ages))}
    tree = world.kv.tree
    nodes = {number: place for place, number in enumerate(sorted(tree.nodes))}
    return (
        tuple(_branch_key(world, number, index, rank) for number in branches),
        tuple(_node_key(tree.nodes[number], index, nodes) for number in nodes),
        tuple(sorted((root.root, _below(root, nodes)) for root in tree.roots.values())),
        world.kv.pages.free,
        world.kv.slots.free,
        len(world.orders),
        world.early_seen == world.pressure(),
        world.growth.snapshot(),
        tuple(
            (ticket.direction, tuple(nodes[node.id] for node in tree.in_copy[number]))
            for number, ticket in world.tickets.items()
        ),
        tuple(sorted((index[number], when) for number, when in world.due.items())),
        tuple(
            tuple((index.get(row.branch, -1), row.position, row.tokens, row.sample is not None) for row in plan.rows)
            for plan in world.flights.values()
        ),
        tuple(
            sorted(
                (index[number], index[filler])
                for number, (filler, turn) in world.fill_of.items()
                if _runs(world, filler, turn)
            )
        ),
    )


def _runs(world: SchedulerState, number: BranchId, turn: int) -> bool:
    state = world.states.get(number)
    return state is not None and not isinstance(state, Held) and state.turn.spec.turn == turn


def _branch_key(world: SchedulerState, number: BranchId, index: dict[BranchId, int], rank: dict[int, int]) -> Hashable:
    state = world.states[number]
    branch = state.branch
    turn = room = then = None
    if not isinstance(state, Held):
        asked = state.turn
        turn = (
            rank[asked.age],
            asked.drawn,
            asked.max_tokens,
            asked.end,
            asked.admitted,
            asked.spec.grammar is not None or bool(asked.spec.stop_strings),
            asked.waits,
            asked.prepared,
            asked.spoilt,
            asked.enters,
        )
    if isinstance(state, Promoting | Prefilling | Decoding | Settling):
        held = state.room
        room = (held.tail_start, len(held.tail), held.issued, held.done, held.copy is not None, held.flight)
    if isinstance(state, Settling):
        then = (state.then.next, tuple(index[child] for child in state.then.children))
    parent = world.kv.branches.get(branch.trunk[0]) if branch.trunk else None
    adoptable = (index[parent.id], parent.moves == branch.trunk[1]) if parent is not None and branch.trunk else None
    lease, session = world.leases.get(number), world.sessions[branch.session]
    return (
        type(state).__name__,
        branch.log.packed(0, branch.known),
        branch.leaf.end,
        branch.seed_rows,
        branch.computed,
        index[min(session.branches)],
        session.orphaned,
        branch.root,
        (rank[session.place], session.turns_in_place, session.grown) if session.turns_in_place else None,
        number in world.rested,
        branch.private,
        turn,
        room,
        then,
        adoptable,
        None if lease is None else lease.until,
        world.firm.get(number),
        tuple(wait.cut for wait in world.waiting.get(number, ())),
    )


def _node_key(node: Node, index: dict[BranchId, int], nodes: dict[NodeId, int]) -> Hashable:
    def places(numbers: set[BranchId]) -> tuple[int, ...]:
        return tuple(sorted(index.get(number, -1) for number in numbers))

    return (
        node.root,
        node.ids,
        node.start,
        type(node.state).__name__,
        node.failures,
        node.disowned,
        places(node.leaf_of),
        places(node.seed_of),
        places(node.pinned_by),
        _below(node, nodes),
    )


def _below(node: Node, nodes: dict[NodeId, int]) -> Hashable:
    """What hangs below a node, in its order: of rows that serve equally, a seed is taken from the first."""
    return tuple(nodes[one.id] for below in (node.stubs, node.children) for one in below.values())
