"""Nodes in the order in which they lose rows, ranked once for a whole plan; only what the plan moves is ranked anew.

Within a plan time stands still, so a key changes only with the holders and pins of a node. A caller that makes a key
larger, or adds a candidate, calls `again`; keys that became smaller are found when their turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import TypeAlias, final

from agentspeed_engine.ids import BranchId, NodeId
from agentspeed_engine.kv.tree import Node, tenant_of, upward

Key: TypeAlias = tuple[int, float]
"""The larger goes first; of equals the older node."""
_Entry: TypeAlias = tuple[int, float, NodeId, Node]


@final
class Ranking:
    """The largest key is at hand."""

    __slots__ = ("_heap", "_key")

    def __init__(self, nodes: Iterable[Node], key: Callable[[Node], Key | None]) -> None:
        """`key` gives None for a node that cannot go."""
        self._key = key
        self._heap = [(-found[0], -found[1], node.id, node) for node in nodes if (found := key(node)) is not None]
        heapify(self._heap)

    def again(self, node: Node) -> None:
        """Ranks a node anew: its key may have grown, or it has become a candidate."""
        key = self._key(node)
        if key is not None:
            heappush(self._heap, _entry(node, key))

    def first(self) -> tuple[Key, Node] | None:
        """The node that goes first, and its key; None when none can go."""
        return self._top(self._heap)

    def as_made(self) -> Iterator[tuple[Key, Node]]:
        """As `candidates`, for who has just made the ranking: no key has changed, so none is asked for again."""
        return (((-first, -second), node) for first, second, _, node in sorted(self._heap))

    def candidates(self) -> Iterator[tuple[Key, Node]]:
        """All that can go, each once, first those that go first."""
        heap, seen = self._heap.copy(), set[NodeId]()
        while (top := self._top(heap)) is not None:
            _ = heappop(heap)
            if top[1].id not in seen:
                seen.add(top[1].id)
                yield top

    def _top(self, heap: list[_Entry]) -> tuple[Key, Node] | None:
        while heap:
            entry = heap[0]
            node, key = entry[3], self._key(entry[3])
            if key is None:
                _ = heappop(heap)
            elif _entry(node, key)[:3] == entry[:3]:
                return key, node
            else:
                _ = heapreplace(heap, _entry(node, key))
        return None


def _entry(node: Node, key: Key) -> _Entry:
    return -key[0], -key[1], node.id, node


@final
class Rankings:
    """The rankings of one plan; each is made when it is first asked for."""

    __slots__ = ("hosts", "left", "losing", "victims")

    def __init__(self) -> None:
        self.victims: dict[str | None, Ranking] = {}
        """Tips: whose device pages go first; of one tenant, or (None) of all."""
        self.hosts: Ranking | None = None
        """Nodes on the host alone: whose slots go first."""
        self.left: Node | None = None
        """What is left of the node that lost pages last, or the one above it."""
        self.losing: frozenset[BranchId] = frozenset()
        """The branches that lose their rows at present."""

    def moved(self, *nodes: Node | None) -> None:
        """Says that the holders of these nodes changed, or that their last pin went."""
        for node in nodes:
            if node is None:
                continue
            if self.hosts is not None:
                self.hosts.again(node)
            owner = next((above for above in upward(node) if above.owns_pages), None)
            if owner is not None:  # the only tip that this node can be, or be below
                for tenant, ranking in self.victims.items():
                    if tenant is None or tenant == tenant_of(owner.root):
                        ranking.again(owner)
