"""What a search leaves behind: the tree of branches it tried, the best one, and what all of it cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from agentspeed._base.wording import counted
from agentspeed.usage import Usage

if TYPE_CHECKING:
    from rich.tree import Tree

    from agentspeed.session import Session

State = Literal["open", "finished", "pruned", "failed", "cut"]
"""open: may be gone on with. finished: the message is complete. pruned: given up early, not among the best, or a twin.
failed: the try raised `error`, or called a tool that nobody runs. cut: the budget or a solution ended it before it had
a score. The text of a failed or cut one is what it had said."""


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """One branch of a search. `whole` is the assistant's message so far, `text` what this step added.

    `branch` is closed once it has lost; read it in `score`."""

    number: int
    parent: Node | None
    branch: Session
    whole: str = ""
    text: str = ""
    score: float | None = None
    state: State = "open"
    error: Exception | None = None
    """What a failed try raised: an output that is none, a context that is full, a turn that took longer than its
    timeout, a tool's error, or anything at all in an own attempt."""
    usage: Usage = field(default_factory=Usage)
    children: list[Node] = field(default_factory=list)
    twins: int = 0
    """Siblings that wrote the very same step: closed without a score, for this one goes on for all of them."""
    visits: int = 0
    value: float = 0.0
    """Sum of the scores seen below this node; with `visits`, what a Monte Carlo search goes by."""

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def path(self) -> list[Node]:
        """From the root to this node."""
        above = [] if self.parent is None else self.parent.path()
        return [*above, self]

    def walk(self) -> Iterator[Node]:
        """This node and everything below it, oldest child first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __repr__(self) -> str:
        score = "" if self.score is None else f" {self.score:.3g}"
        return f"<Node {self.number} {self.state}{score} {self.text[:40]!r}>"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Tokens are rows really computed. `tokens_without_fork`: the same turns, each sending its whole context again;
    never fewer than with fork."""

    branches: int
    pruned: int
    failed: int
    tokens: int
    tokens_without_fork: int
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times more the same search computes without fork."""
        return self.tokens_without_fork / self.tokens if self.tokens else 1.0

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"{counted(self.branches, 'branch', 'branches')} ({self.pruned} pruned{failed}), "
            f"{counted(self.tokens, 'token')} computed, "
            f"{self.tokens_without_fork} without fork ({self.ratio:.1f} times), {self.seconds:.2f} s"
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`best` is None when no branch was finished and scored: a step that could be gone on with is no answer yet, a
    text that is no `output` is none at all. When every try failed and one of them by any other error, there is no
    `Found`: the search raises that error, with the tree as its note.

    `ended` says why the search stopped: "solved", "exhausted" (nothing was left to try), or the bound of the budget
    that ended it or left it fewer branches or shorter texts than it asked for."""

    best: Node | None
    root: Node
    cost: Cost
    ended: Literal["solved", "exhausted", "tokens", "seconds", "branches"]

    @property
    def text(self) -> str:
        """The best answer; empty when there is none."""
        return "" if self.best is None else self.best.whole

    @property
    def score(self) -> float | None:
        return None if self.best is None else self.best.score

    def tree(self) -> Tree:
        """For `rich.print`: every branch with its score and tokens, the best path marked."""
        from rich.text import Text
        from rich.tree import Tree

        chosen = set() if self.best is None else {node.number for node in self.best.path()}

        def grow(shown: Tree, node: Node) -> None:
            for child in node.children:
                lost = {"pruned": "dim", "cut": "dim", "failed": "red"}.get(child.state, "")
                style = "bold green" if child.number in chosen else lost
                grow(shown.add(Text(_line(child), style=style)), child)

        top = Tree(Text(f"{self.ended}: {self.cost}"))
        grow(top, self.root)
        return top

    def __str__(self) -> str:
        chosen = set() if self.best is None else {node.number for node in self.best.path()}
        lines = [f"{self.ended}: {self.cost}"]
        for node in self.root.walk():
            if node is not self.root:
                mark = "*" if node.number in chosen else " "
                lines.append(f"{mark} {'  ' * (node.depth - 1)}{_line(node)}")
        return "\n".join(lines)


def _line(node: Node) -> str:
    score = "-" if node.score is None else f"{node.score:.3g}"
    twins = f", {counted(node.twins, 'twin')}" if node.twins else ""
    why = "" if node.error is None else f"  {_short(f'{type(node.error).__name__}: {node.error}', 96)}"
    return f"{score:>5}  {_short(node.text, 56)}  [{node.state}, {node.usage.computed} tok{twins}]{why}"


def _short(text: str, most: int) -> str:
    """In one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
