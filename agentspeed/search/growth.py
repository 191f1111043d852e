"""Grows a tree of branches for every kind of search: forks, attempts, scores, closes what is given up, counts.

The session searched from is not touched until the end: all branches hang below one child of it, the root. The best
branch is then adopted up its path; or nothing happened, if the search fails or is cancelled.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, final

import anyio

from agentspeed import events
from agentspeed.checking import check_count, check_seconds
from agentspeed.errors import ContextOverflow, InvalidRequest, OutputError
from agentspeed.messages import Assistant, Message, System, ToolMessage, User
from agentspeed.search.tree import Cost, Found, Node
from agentspeed.session import Session
from agentspeed.usage import Usage

Score: TypeAlias = Callable[[Node], float | Awaitable[float]]
"""How good an attempt is; the largest wins."""
Keep: TypeAlias = Callable[[str], bool]
"""Asked about the text as it grows; False ends the attempt at once."""
Attempt: TypeAlias = Callable[[Session], Awaitable[str]]
"""One try on a branch, in your own words; what it returns is scored."""
Ended: TypeAlias = Literal["solved", "exhausted", "tokens", "seconds", "branches"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds of one search; None is unbounded. `tokens` bounds what is drawn and prefilled by the search."""

    tokens: int | None = None
    seconds: float | None = None
    branches: int = 256

    def __post_init__(self) -> None:
        check_count("Budget tokens", self.tokens, none=True)
        check_seconds("Budget seconds", self.seconds)
        check_count("Budget branches", self.branches)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all searches have in common.

    `score`: how good a branch is, higher is better. `solved_at`: the first finished branch that scores this much ends
    the search at once. `least`: a step that scores less is closed at once. `keep`: asked with the text as it grows;
    False closes the branch there. `attempt`: makes the branch's answer itself (for agents with tools) instead of one
    turn. `options` go to every turn."""

    score: Score
    solved_at: float | None = None
    least: float | None = None
    keep: Keep | None = None
    attempt: Attempt | None = None
    budget: Budget = field(default_factory=Budget)
    at_once: int = 16
    temperature: float = 1.0
    seed: int = 0
    adopt: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@final
class Grower:
    """The tree of one running search."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session = session
        self.plan = plan
        self._stack = AsyncExitStack()
        self._count = 0
        self._spent = 0
        self._without_fork = 0
        self._started = anyio.current_time()
        self.ended: Ended | None = None
        self._smaller: Ended | None = None
        """The bound that left the search fewer branches or shorter texts than it asked for."""
        self.root: Node
        self.best: Node | None = None

    async def plant(self, prompt: str | Message | Sequence[Message] | None) -> None:
        """Computes the shared context once, so that every branch starts from rows that exist."""
        (stem,) = await self._stack.enter_async_context(self._session.fork(1))
        self.root = Node(number=0, parent=None, branch=stem)
        if prompt is None:
            return
        messages = (prompt,) if isinstance(prompt, str | System | User | Assistant | ToolMessage) else tuple(prompt)
        _ = await stem.add(*messages, prefill=True)
        self._spent += stem.usage.computed

    def may_grow(self) -> bool:
        """False once the search is solved or a bound is reached."""
        budget = self.plan.budget
        if self.ended is None and budget.tokens is not None and self._spent >= budget.tokens:
            self.ended = "tokens"
        if self.ended is None and self._count >= budget.branches:
            self.ended = "branches"
        return self.ended is None

    async def expand(self, node: Node, n: int, *, stop: str | None = None) -> list[Node]:
        """Forks up to `n` children and lets each make its step; gives those that can be gone on with or finished."""
        asked, n = n, min(n, self.plan.budget.branches - self._count)
        if n < 1 or not self.may_grow():
            return []
        if n < asked:
            self._smaller = "branches"
        branches = await self._stack.enter_async_context(node.branch.fork(n))
        born: list[Node] = []
        for branch in branches:
            self._count += 1
            born.append(Node(number=self._count, parent=node, branch=branch, whole=node.whole))
        node.children.extend(born)
        await self._attempt_all(born, stop)
        return [child for child in born if child.state in ("open", "finished")]

    async def prune(self, nodes: Sequence[Node]) -> None:
        """Closes branches that will not be gone on with: what only they hold is free at once."""
        for node in nodes:
            if node.state == "open":
                node.state = "pruned"
            await _close(node)

    async def harvest(self) -> Found:
        """Adopts the best branch up its path (unless asked not to) and says what the search came to."""
        if self.best is not None and self.plan.adopt:
            path = self.best.path()
            for parent, child in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
                await parent.branch.adopt(child.branch)
            await self._session.adopt(self.root.branch)
        nodes = [node for node in self.root.walk() if node is not self.root]
        cost = Cost(
            branches=len(nodes), pruned=sum(node.state in ("pruned", "cut") for node in nodes), tokens=self._spent,
            tokens_without_fork=self._without_fork, seconds=anyio.current_time() - self._started,
        )
        return Found(best=self.best, root=self.root, cost=cost, ended=self.ended or self._smaller or "exhausted")

    async def close(self) -> None:
        """Every branch that is still open ends; the adopted one is no branch any more."""
        await self._stack.aclose()

    # ---- attempts -------------------------------------------------------------------------------------------------
    async def _attempt_all(self, nodes: Sequence[Node], stop: str | None) -> None:
        limiter = anyio.CapacityLimiter(self.plan.at_once)
        bound = self._bound(len(nodes))

        async def one(node: Node) -> None:
            async with limiter:
                try:
                    await self._attempt(node, stop, bound)
                except (OutputError, ContextOverflow):
                    node.state = "failed"
                    await _close(node)
                if self.ended == "solved":
                    group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                for node in nodes:
                    _ = group.start_soon(one, node)
        except ExceptionGroup as failed:
            # The siblings are stopped by now; who asked for the search is told the error as it was raised.
            raise failed.exceptions[0] from failed.exceptions[0].__cause__
        finally:
            for node in nodes:
                if node.state == "open" and node.score is None:
                    node.state = "cut"
        for node in nodes:
            if node.state == "cut":
                await _close(node)

    def _bound(self, attempts: int) -> int | None:
        """Tokens each attempt may draw, so that all of them together stay inside the budget."""
        asked: int | None = self.plan.options.get("max_tokens")
        if self.plan.budget.tokens is None:
            return asked
        share = max(1, (self.plan.budget.tokens - self._spent) // attempts)
        return share if asked is None else min(asked, share)

    async def _attempt(self, node: Node, stop: str | None, bound: int | None) -> None:
        if self.plan.attempt is None:
            given_up = await self._turn(node, stop, bound)
        else:
            given_up = False
            await self._own_attempt(node, self.plan.attempt)
        above = "" if node.parent is None else node.parent.whole
        node.text = node.whole.removeprefix(above)
        if given_up:
            await self.prune([node])
            return
        scored = self.plan.score(node)
        score: object = await scored if inspect.isawaitable(scored) else scored
        try:
            node.score = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"score gave {score!r} for {node.whole!r}.",
                                 remedy="Give a number; higher is better.") from error
        self._judge(node)
        if node.state == "pruned":
            await _close(node)

    async def _turn(self, node: Node, stop: str | None, bound: int | None) -> bool:
        """One turn of the branch; True when `keep` gave it up. Counts what was computed, however the turn ends."""
        options = {"temperature": self.plan.temperature, **self.plan.options, "max_tokens": bound}
        if stop is not None:
            options["stop"] = stop
        seed = self.plan.seed * 1_000_003 + node.number
        async with node.branch.stream(None, seed=seed, **options) as turn:
            start = node.branch.tokens
            try:
                async for event in turn:
                    if isinstance(event, events.TextDelta) and self.plan.keep and not self.plan.keep(turn.text):
                        node.whole = turn.text
                        return True
                reply = turn.result()
            finally:
                self._add(node, replace(turn.usage, drawn=max(turn.usage.drawn, node.branch.tokens - start)))
        node.whole = reply.text
        if reply.finish_reason == "max_tokens" and bound != self.plan.options.get("max_tokens"):
            self._smaller = "tokens"
        if stop is None or reply.finish_reason not in ("stop_string", "max_tokens"):
            node.state = "finished"
        return False

    async def _own_attempt(self, node: Node, attempt: Attempt) -> None:
        before = node.branch.usage
        try:
            node.whole = await attempt(node.branch)
            node.state = "finished"
        finally:
            self._account(node, before)

    def _account(self, node: Node, before: Usage) -> None:
        after = node.branch.usage
        numbers = {
            name: getattr(after, name) - getattr(before, name)
            for name in ("new", "resumed_device", "resumed_host", "recomputed", "shared", "drawn", "turns")
        }
        self._add(node, Usage(**numbers))

    def _add(self, node: Node, usage: Usage) -> None:
        node.usage = node.usage + usage
        self._spent += usage.computed
        self._without_fork += usage.new + usage.resumed + usage.recomputed + usage.drawn

    def _judge(self, node: Node) -> None:
        assert node.score is not None
        if math.isnan(node.score):
            raise InvalidRequest(f"score gave NaN for {node.whole!r}.", remedy="Give a number; higher is better.")
        if node.state != "finished":
            if self.plan.least is not None and node.score < self.plan.least:
                node.state = "pruned"
            return
        if self.best is None or self.best.score is None or node.score > self.best.score:
            self.best = node
        if self.plan.solved_at is not None and node.score >= self.plan.solved_at:
            self.ended = "solved"


async def search(
    session: Session, prompt: str | Message | Sequence[Message] | None, plan: Plan,
    grow: Callable[[Grower], Awaitable[None]],
) -> Found:
    """Runs one kind of search inside its budget; leaves no branch open, whatever happens."""
    check_count("at_once", plan.at_once)
    grower = Grower(session, plan)
    try:
        with anyio.move_on_after(plan.budget.seconds) as scope:
            await grower.plant(prompt)
            await grow(grower)
        if scope.cancelled_caught:
            grower.ended = "seconds"
        return await grower.harvest()
    finally:
        with anyio.CancelScope(shield=True):
            await grower.close()


async def _close(node: Node) -> None:
    with anyio.CancelScope(shield=True):
        await node.branch.close()
