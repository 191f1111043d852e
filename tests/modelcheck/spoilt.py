"""What must become of the pages and slots behind a spoilt turn: nobody finds them who did not refer to them before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId, PageId, SlotId
from agentspeed_engine.kv.branch_states import Decoding, Prefilling, Settling
from agentspeed_engine.kv.node_states import Both, Host, Loading, Saving
from agentspeed_engine.kv.tree import Node, RootKey, subtree, upward
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.state import SchedulerState

SPOILT = "acknowledge spoilt"
"""The action that the first sample of the oldest step is found to be no finite numbers."""


@dataclass(slots=True)
class Suspects:
    """Pages and slots that a turn read or wrote and no other branch refers to, and who may come to refer to them."""

    branch: BranchId | None
    """None: of nodes that are to go when their copy ends."""
    epoch: int
    others: set[BranchId]
    root: RootKey | None = None
    ids: bytes = b""
    """What the turn's branch knows, and where prompts of its kind begin."""
    copied: PageId | None = None
    """That the turn copied the end of its prefix from, and refers to no more."""
    pages: set[PageId] = field(default_factory=set[PageId])
    slots: set[SlotId] = field(default_factory=set[SlotId])

    def add(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not _kept(node, self.others):
                self.pages |= set(node.pages)
                self.slots |= set(_slots(node))


def suspects(world: SchedulerState, action: object) -> list[Suspects]:
    """Before an action: of each turn that is spoilt then or by the action, and of what waits to go."""
    found: list[Suspects] = []
    waits = Suspects(None, 0, set(world.states))
    for node in world.kv.tree.nodes.values():
        if node.disowned:
            waits.pages |= set(node.pages)
            waits.slots |= set(_slots(node))
    if waits.pages:
        found.append(waits)
    due = first_sampled(world) if action == SPOILT else None
    for number, state in world.states.items():
        if not isinstance(state, Prefilling | Decoding | Settling):
            continue
        branch = state.branch
        if state.turn.spoilt or due == (number, branch.epoch):
            one = Suspects(number, branch.epoch, set(world.states) - {number})
            one.add(upward(branch.leaf))
            one.pages |= set(state.room.tail)
            one.root, one.ids = branch.root, branch.log.packed(0, branch.known)
            if (copy := state.room.copy) is not None:
                source = next(node for node in world.kv.tree.nodes.values() if copy.src in node.pages)
                one.copied = None if _kept(source, one.others) else copy.src
            found.append(one)
    return found


def first_sampled(world: SchedulerState) -> tuple[BranchId, int] | None:
    """(branch, epoch) of the first sample of the oldest step."""
    rows = world.flights[min(world.flights)].rows
    return next(((row.branch, row.epoch) for row in rows if row.sample is not None), None)


def check_suspects(core: Core, before: list[Suspects]) -> None:
    """After the action. Raises `BrokenInvariant` where a branch that did not refer to them would find them; a page that
    was copied from, where a prompt of the same ids would copy from it first."""
    world = core.world
    for one in before:
        if one.branch is not None:
            state = world.states.get(one.branch)
            if state is not None and state.branch.epoch == one.epoch:
                continue  # it has not come to rest
        for node in world.kv.tree.nodes.values():
            touched = not (one.pages.isdisjoint(node.pages) and one.slots.isdisjoint(_slots(node)))
            if not touched and not (one.copied in node.pages and _copied_first(core.snapshot(), one, node.id)):
                continue
            if not _kept(node, one.others) and not any(below.disowned for below in subtree(node)):
                raise BrokenInvariant(f"(10) {node!r} has rows of a spoilt turn, and a prompt would find them")


def _copied_first(world: SchedulerState, one: Suspects, node: NodeId) -> bool:
    """In a world of its own, for a lookup may split nodes."""
    root = None if one.root is None else world.kv.tree.roots.get(one.root)
    seed = None if root is None else world.kv.tree.match(root, one.ids).seed
    return seed is not None and seed.id == node


def _kept(node: Node, others: set[BranchId]) -> bool:
    """Whether one of the others rests or runs on it or on what was computed from it."""
    return any((below.leaf_of | below.seed_of | below.pinned_by) & others for below in subtree(node))


def _slots(node: Node) -> tuple[SlotId, ...]:
    return node.state.slots if isinstance(node.state, Saving | Both | Host | Loading) else ()
