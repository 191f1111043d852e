"""The tree of computed rows: the only index there is. Lookup walks it and compares ids.

A node is a segment (full pages) or a stub (less than one page, never a parent). Every node but a root has a state
(`nodes`), which owns its pages. Who refers to a node stands on the node: branches whose leaf or seed it is, active
branches that pin it, and its children. A node that nobody refers to is cached: kept, first victim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId, PageId
from agentspeed_engine.kv.nodes import Both, Device, Host, Loading, NodeState, Saving
from agentspeed_engine.kv.runs import NodeRun

RootKey: TypeAlias = tuple[str, str, str]
"""(model, adapter, tenant salt): rows are never shared across different ones."""

_ID_BYTES = 4
_SEED_SEARCH = 64
"""Children looked at for a partly matching page; a lookup must not grow with the number of sessions."""


@final
class Node:
    """One segment or stub. Mutated by `Tree` alone."""

    __slots__ = (
        "children", "id", "ids", "leaf_of", "parent", "pinned_by", "root", "run", "seed_of", "start", "state", "stubs",
        "used",
    )

    def __init__(self, node_id: NodeId, root: RootKey, parent: Node | None, start: int, ids: bytes,
                 state: NodeState | None) -> None:
        self.id = node_id
        self.root = root
        self.parent = parent
        self.start = start
        self.ids = ids
        self.state = state
        """None for a root, which has no rows."""
        self.children: dict[bytes, Node] = {}
        """Segments below, by the ids of their first page."""
        self.stubs: dict[NodeId, Node] = {}
        self.leaf_of: set[BranchId] = set()
        self.seed_of: set[BranchId] = set()
        self.pinned_by: set[BranchId] = set()
        self.run: NodeRun | None = None
        self.used = 0.0
        """When a branch last computed on it."""

    @property
    def tokens(self) -> int:
        return len(self.ids) // _ID_BYTES

    @property
    def end(self) -> int:
        return self.start + len(self.ids) // _ID_BYTES

    @property
    def readable(self) -> bool:
        """A step may read it."""
        return self.state is None or isinstance(self.state, Device | Saving | Both)

    @property
    def referenced(self) -> bool:
        return bool(self.leaf_of or self.seed_of or self.children or self.stubs)

    @property
    def pages(self) -> tuple[PageId, ...]:
        """Device pages; none for a root and for rows on the host."""
        match self.state:
            case Device() | Saving() | Both() | Loading() as state:
                return state.pages
            case _:
                return ()

    def __repr__(self) -> str:
        return f"<Node {self.id} [{self.start}, {self.end}) {type(self.state).__name__}>"


class Match(NamedTuple):
    """The longest known prefix of some ids: whole pages up to `node`.end, then `rows` rows of `seed`'s first page."""

    node: Node
    seed: Node | None
    rows: int


@final
class Tree:
    """All nodes of one engine, one root per key."""

    def __init__(self, page_tokens: int, reshaped: Callable[[set[BranchId]], None]) -> None:
        self.page_tokens = page_tokens
        self.roots: dict[RootKey, Node] = {}
        self.nodes: dict[NodeId, Node] = {}
        """Every node with rows."""
        self.tips: dict[NodeId, Node] = {}
        """Nodes with no node below: the only ones that may go. Insertion ordered, so that runs repeat."""
        self._next = 0
        self._page_bytes = page_tokens * _ID_BYTES
        self._reshaped = reshaped
        """Told which active branches read a node that was split or merged."""

    # ---- lookup ---------------------------------------------------------------------------------------------------
    def root(self, key: RootKey) -> Node:
        node = self.roots.get(key)
        if node is None:
            node = self.roots[key] = Node(self._fresh_id(), key, None, 0, b"", None)
        return node

    def match(self, start: Node, packed: bytes) -> Match:
        """The longest match of `packed` ids below `start`, splitting a segment that matches in part."""
        node, offset, size = start, 0, self._page_bytes
        while True:
            child = node.children.get(packed[offset : offset + size])
            if child is None:
                break
            pages = self._common_pages(child.ids, packed, offset)
            if pages * size < len(child.ids):
                node = self.split(child, pages)
                offset += pages * size
                break
            node = child
            offset += len(child.ids)
        seed, rows = self._partial(node, packed[offset : offset + size])
        return Match(node, seed, rows)

    def _common_pages(self, ids: bytes, packed: bytes, offset: int) -> int:
        length = min(len(ids), len(packed) - offset) // self._page_bytes
        low, high = 1, length
        if ids[: high * self._page_bytes] == packed[offset : offset + high * self._page_bytes]:
            return high
        while low < high:  # the largest number of whole pages that agree
            middle = (low + high + 1) // 2
            if ids[: middle * self._page_bytes] == packed[offset : offset + middle * self._page_bytes]:
                low = middle
            else:
                high = middle - 1
        return low

    def _partial(self, node: Node, wanted: bytes) -> tuple[Node | None, int]:
        """The node below with most rows of its first page in common with `wanted`."""
        best, best_rows = None, 0
        for count, child in enumerate(_below(node)):
            if count == _SEED_SEARCH:
                break
            rows = _common_ids(child.ids, wanted)
            if rows > best_rows and child.readable:
                best, best_rows = child, rows
        return best, best_rows

    def path(self, leaf: Node) -> tuple[NodeRun, ...]:
        """What a step reads of a leaf's path, root first."""
        runs: list[NodeRun] = []
        for node in upward(leaf):
            if node.run is None:
                node.run = NodeRun(node.id, node.start, node.tokens, node.pages)
            runs.append(node.run)
        runs.reverse()
        return tuple(runs)

    # ---- shape ----------------------------------------------------------------------------------------------------
    def attach(self, parent: Node, ids: bytes, state: NodeState, now: float) -> Node:
        """A new node below `parent`. An equal segment may not be there yet; stubs may repeat."""
        node = Node(self._fresh_id(), parent.root, parent, parent.end, ids, state)
        node.used = now
        self._link(parent, node)
        self.nodes[node.id] = node
        self.tips[node.id] = node
        return node

    def child(self, parent: Node, ids: bytes) -> Node | None:
        """The segment below `parent` that starts with the first page of `ids`."""
        return parent.children.get(ids[: self._page_bytes])

    def split(self, node: Node, upper_pages: int) -> Node:
        """A new node takes the first pages; `node` keeps its identity, its holders and the rest. Returns the new."""
        if node.parent is None or not isinstance(node.state, Device | Saving | Both | Host | Loading):
            raise BrokenInvariant("a root has no rows to split")
        cut = upper_pages * self._page_bytes
        if not 0 < cut < len(node.ids):
            raise BrokenInvariant(f"{node!r} cannot be split after {upper_pages} pages")
        parent = node.parent
        self._unlink(parent, node)
        above, below = node.state.split(upper_pages)
        upper = Node(self._fresh_id(), node.root, parent, node.start, node.ids[:cut], above)
        upper.used = node.used
        upper.pinned_by = set(node.pinned_by)
        self._link(parent, upper)
        node.state, node.ids, node.start, node.parent, node.run = below, node.ids[cut:], upper.end, upper, None
        upper.children[node.ids[: self._page_bytes]] = node
        self.nodes[upper.id] = upper
        self._reshaped(node.pinned_by)
        return upper

    def merge_above(self, node: Node) -> None:
        """Joins `node` with its parent while the parent's only reference is `node` and both are on the device."""
        while True:
            parent = node.parent
            if parent is None or parent.parent is None or len(parent.children) != 1 or parent.stubs:
                return
            if parent.leaf_of or parent.seed_of or parent.pinned_by != node.pinned_by or self.is_stub(node):
                return
            above, below = parent.state, node.state
            if not isinstance(above, Device) or not isinstance(below, Device):
                return
            grandparent = parent.parent
            self._unlink(grandparent, parent)
            node.state = above.joined(below)
            node.ids, node.start, node.parent, node.run = parent.ids + node.ids, parent.start, grandparent, None
            self._link(grandparent, node)
            del self.nodes[parent.id]
            self._reshaped(node.pinned_by)

    def shrink(self, node: Node, pages: int) -> tuple[PageId, ...]:
        """Takes the last pages off a tip that nobody pins; its holders stay and have less."""
        if node.pinned_by or node.children or node.stubs or not isinstance(node.state, Device):
            raise BrokenInvariant(f"{node!r} cannot shrink")
        node.state, freed = node.state.shrink(pages)
        node.ids = node.ids[: -pages * self._page_bytes]
        node.run = None
        return freed

    def detach(self, node: Node) -> Node:
        """Removes a tip that nobody pins and whose leaf and seed holders have moved on. Returns its parent."""
        if node.pinned_by or node.referenced or node.parent is None:
            raise BrokenInvariant(f"{node!r} is still referred to")
        parent = node.parent
        self._unlink(parent, node)
        del self.nodes[node.id]
        del self.tips[node.id]
        node.parent = None
        if parent.parent is not None and not parent.children and not parent.stubs:
            self.tips[parent.id] = parent
        return parent

    def is_stub(self, node: Node) -> bool:
        return len(node.ids) < self._page_bytes and node.parent is not None

    def _link(self, parent: Node, node: Node) -> None:
        if len(node.ids) < self._page_bytes:
            parent.stubs[node.id] = node
        else:
            key = node.ids[: self._page_bytes]
            if key in parent.children:
                raise BrokenInvariant(f"two segments below {parent!r} start with the same page")
            parent.children[key] = node
        self.tips.pop(parent.id, None)

    def _unlink(self, parent: Node, node: Node) -> None:
        if len(node.ids) < self._page_bytes:
            del parent.stubs[node.id]
        else:
            del parent.children[node.ids[: self._page_bytes]]

    def _fresh_id(self) -> NodeId:
        self._next += 1
        return NodeId(self._next)


def upward(leaf: Node) -> Iterator[Node]:
    """The nodes with rows from `leaf` to the root."""
    node: Node | None = leaf
    while node is not None and node.parent is not None:
        yield node
        node = node.parent


def _below(node: Node) -> Iterator[Node]:
    yield from node.stubs.values()
    yield from node.children.values()


def _common_ids(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right)) // _ID_BYTES
    if left[: length * _ID_BYTES] == right[: length * _ID_BYTES]:
        return length
    low, high = 0, length - 1
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * _ID_BYTES] == right[: middle * _ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
