"""Grows a tree of branches for every kind of search: forks, attempts, scores, closes what is given up, counts.

The session searched from is not touched until the end: all branches hang below one child of it, the root. The best
branch is then adopted up its path; or nothing happened, if the search fails or is cancelled.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Final, final

import anyio

from agentspeed import events
from agentspeed._base.wording import counted
from agentspeed._core.options import Prompt, messages_of
from agentspeed.errors import (
    ConnectFailed,
    ContextOverflow,
    EngineError,
    InternalError,
    InvalidRequest,
    OutputError,
    ToolError,
    TurnTimeout,
)
from agentspeed.messages import Assistant, Message
from agentspeed.search.plan import Attempt, Ended, Plan, check_free, checked
from agentspeed.search.tree import Cost, Found, Node
from agentspeed.session import Session
from agentspeed.usage import Usage

_OF_ONE_TRY: Final = (OutputError, ContextOverflow, TurnTimeout, ToolError)
"""Errors that end one try; other tries go on. Any other error is a mistake in the call of the search: every try would
raise it, so the search raises it."""
_OF_ALL: Final = (InternalError, EngineError, ConnectFailed)
"""Errors that end the whole search, whichever try raised them: a bug, or an engine that cannot go on."""


@final
class Grower:
    """The tree of one running search."""

    def __init__(self, session: Session, plan: Plan, options: dict[str, Any]) -> None:
        self._session = session
        self.plan = plan
        self._options = options
        self._stack = AsyncExitStack()
        self._count = 0
        self._spent = 0
        self._without_fork = 0
        self._started = anyio.current_time()
        self.ended: Ended | None = None
        self._smaller: Ended | None = None
        """The bound that left the search fewer branches or shorter texts than it asked for."""
        self.root = Node(number=0, parent=None, branch=session)
        self.best: Node | None = None
        self._held: set[Node] = set()
        """Branches that are not closed, but for the root's."""
        self._levels: dict[int, list[Node]] = {}
        """The open steps of each depth that go on, when only the best `width` do."""
        self._steps: dict[tuple[int, tuple[int, ...]], Node] = {}
        """By parent and drawn ids: the first child of that parent that wrote this step."""
        self._largest = 0
        """Tokens of the largest own attempt so far."""

    async def plant(self, messages: Sequence[Message]) -> None:
        """Computes the shared context once, so that every branch starts from rows that exist."""
        (stem,) = await self._stack.enter_async_context(self._session.fork(1))
        self.root = Node(number=0, parent=None, branch=stem)
        if messages:
            _ = await stem.add(*messages)
        await self._check_room(stem)
        if messages:
            _ = await stem.add(prefill=True)
            self._spent += stem.usage.computed

    async def _check_room(self, stem: Session) -> None:
        """A prefill is not cut in its middle, so it begins only when the budget leaves branches something to draw."""
        if (tokens := self.plan.budget.tokens) is None:
            return
        _ = await stem.inspect()
        if (missing := stem.residence.lost) >= tokens:
            raise InvalidRequest(
                f"Budget(tokens={tokens}) is used up before a branch draws anything: "
                f"{counted(missing, 'token')} of the context must be computed first.",
                remedy="Give more tokens than that, or a shorter prompt.",
            )

    def may_grow(self) -> bool:
        """False once the search is solved or a bound is reached."""
        budget = self.plan.budget
        if self.ended is None and budget.tokens is not None and self._spent >= budget.tokens:
            self.ended = "tokens"
        if self.ended is None and budget.branches is not None and self._count >= budget.branches:
            self.ended = "branches"
        return self.ended is None

    async def expand(self, node: Node, n: int, *, whole: bool = False) -> list[Node]:
        """Forks up to `n` children and lets each make its step, or its `whole` answer; gives those that can be gone on
        with or finished."""
        n = self._room(n)
        if n < 1 or not self.may_grow():
            return []
        branches = await self._stack.enter_async_context(node.branch.fork(n))
        born: list[Node] = []
        for branch in branches:
            self._count += 1
            born.append(Node(number=self._count, parent=node, branch=branch, whole=node.whole))
        node.children.extend(born)
        self._held.update(born)
        await self._attempt_all(born, whole or self.plan.stop is None)
        return [child for child in born if child.state in ("open", "finished")]

    def level(self, depth: int) -> list[Node]:
        """The steps of this depth that go on, best first."""
        return sorted(self._levels.get(depth, ()), key=_rank, reverse=True)

    async def prune(self, node: Node) -> None:
        """Closes an open branch that will not be gone on with."""
        node.state = "pruned"
        await self._let_go(node)

    async def harvest(self) -> Found:
        """Adopts the best branch up its path (unless asked not to) and says what the search came to. When every try
        failed, that is the first one's error; but texts that are no `output` are only no answers."""
        if self.best is not None and self.plan.adopt:
            path = self.best.path()
            for parent, child in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
                await parent.branch.adopt(child.branch)
            await self._session.adopt(self.root.branch)
        nodes = [node for node in self.root.walk() if node is not self.root]
        cost = Cost(
            branches=len(nodes),
            pruned=sum(node.state in ("pruned", "cut") for node in nodes),
            failed=sum(node.state == "failed" for node in nodes),
            tokens=self._spent,
            # A try that was stopped before it could say what it took: without fork it takes what it does with it.
            tokens_without_fork=max(self._without_fork, self._spent),
            seconds=anyio.current_time() - self._started,
        )
        found = Found(best=self.best, root=self.root, cost=cost, ended=self.ended or self._smaller or "exhausted")
        met = [node.error for node in nodes if node.error is not None]
        raised = [error for error in met if not isinstance(error, OutputError)]
        if raised and len(met) == len(nodes):
            raised[0].add_note(f"Every try of the search failed; this is one of their errors.\n{found}")
            raise raised[0]
        return found

    async def close(self) -> None:
        """Every branch that is still open ends; the adopted one is no branch any more."""
        await self._stack.aclose()

    # ---- bounds ---------------------------------------------------------------------------------------------------
    def _room(self, asked: int) -> int:
        """How many of so many branches the budget has room for now."""
        budget = self.plan.budget
        n = asked
        if budget.branches is not None and budget.branches - self._count < n:
            n = budget.branches - self._count
            self._smaller = "branches"
        if self.plan.attempt is None or budget.tokens is None:
            return n
        # Nothing cuts an own attempt in its middle, so it begins only when one like the largest so far still fits.
        fitting = (budget.tokens - self._spent) // self._largest if self._largest else 1
        if fitting < 1:
            self.ended = "tokens"
        return min(n, fitting)

    def _bound(self, attempts: int) -> int | None:
        """Tokens each turn may draw, so that all of them together stay inside the budget."""
        asked = self._asked_tokens()
        if self.plan.budget.tokens is None:
            return asked
        share = max(1, (self.plan.budget.tokens - self._spent) // attempts)
        return share if asked is None else min(asked, share)

    def _asked_tokens(self) -> int | None:
        """What each turn may draw where there is no budget."""
        asked: int | None = self.plan.options.get("max_tokens")
        return self._session.defaults.max_tokens if asked is None else asked

    # ---- attempts -------------------------------------------------------------------------------------------------
    async def _attempt_all(self, nodes: Sequence[Node], whole: bool) -> None:
        limiter = anyio.CapacityLimiter(self.plan.at_once)
        bound = self._bound(len(nodes))

        async def one(node: Node) -> None:
            async with limiter:
                await self._attempt(node, whole, bound)
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
                if node.state in ("open", "finished") and node.score is None:
                    node.state = "cut"
        for node in nodes:
            if node.state == "cut":
                await self._let_go(node)

    async def _attempt(self, node: Node, whole: bool, bound: int | None) -> None:
        try:
            await self._speak(node, whole, bound)
            if node.state in ("open", "finished"):
                node.score = await self._scored(node)
        except _OF_ONE_TRY as error:
            node.state, node.error = "failed", error
        lost = node if node.score is None else self._judge(node, node.score)
        if lost is not None:
            await self._let_go(lost)

    async def _speak(self, node: Node, whole: bool, bound: int | None) -> None:
        above = "" if node.parent is None else node.parent.whole
        try:
            if self.plan.attempt is None:
                await self._turn(node, whole, bound)
            else:
                await self._own_attempt(node, self.plan.attempt)
        finally:
            node.text = node.whole.removeprefix(above)

    async def _turn(self, node: Node, whole: bool, bound: int | None) -> None:
        """One turn of the branch. Counts what was computed and keeps the text, however the turn ends."""
        options = {**self._options, "max_tokens": bound}
        if whole and self.plan.stop is not None:
            del options["stop"]
        seed = (self.plan.seed * 1_000_003 + node.number) % 2**63
        stop = options.get("stop")
        if stop is not None:
            options["include_stop"] = True  # it separates the steps of the message
        async with node.branch.stream(None, seed=seed, **options) as turn:
            start = node.branch.tokens
            try:
                async for event in turn:
                    node.whole = turn.text.removesuffix(stop or "")
                    if isinstance(event, events.TextDelta) and self.plan.keep and not self.plan.keep(node.whole):
                        node.state = "pruned"
                        return
                reply = turn.result()
            finally:
                node.whole = turn.text.removesuffix(stop or "")
                self._add(node, replace(turn.usage, drawn=max(turn.usage.drawn, node.branch.tokens - start)))
        if reply.finish_reason == "max_tokens" and bound != self._asked_tokens():
            self._smaller = "tokens"
        if reply.tool_calls:
            node.state = "failed"
        elif whole or reply.finish_reason not in ("stop_string", "max_tokens"):
            node.state = "finished"
        elif not self.plan.again:
            self._find_twin(node, reply.ids)

    def _find_twin(self, node: Node, ids: tuple[int, ...]) -> None:
        """A step that a sibling wrote to the id has the same context as the sibling: going on with both is going on
        twice with one."""
        assert node.parent is not None
        first = self._steps.setdefault((node.parent.number, ids), node)
        if first is not node:
            first.twins += 1
            node.state = "pruned"

    async def _own_attempt(self, node: Node, attempt: Attempt) -> None:
        before, known = node.branch.usage, len(node.branch.messages)
        try:
            made = attempt(node.branch)
            text: object = await made if inspect.isawaitable(made) else made
        except Exception as error:
            if _ends_all(error):
                raise
            node.state, node.error = "failed", error
        else:
            if text is made or not isinstance(text, str):
                raise InvalidRequest(f"attempt gave {text!r}; it must be async and give a text, which is scored.")
            node.whole, node.state = text, "finished"
        finally:
            if node.state != "finished":
                said = [message.text for message in node.branch.messages[known:] if isinstance(message, Assistant)]
                node.whole = said[-1] if said else ""
            usage = node.branch.usage - before
            self._largest = max(self._largest, usage.computed, 1)
            self._add(node, usage)

    def _add(self, node: Node, usage: Usage) -> None:
        node.usage = node.usage + usage
        self._spent += usage.computed
        self._without_fork += usage.new + usage.resumed + usage.recomputed + usage.drawn

    # ---- who wins and who lost ------------------------------------------------------------------------------------
    async def _scored(self, node: Node) -> float:
        scored = self.plan.score(node)
        given: object = await scored if inspect.isawaitable(scored) else scored
        try:
            score = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"score gave {given!r} for {node.whole!r}.", remedy="Give a number; higher is better."
            ) from error
        if math.isnan(score):
            raise InvalidRequest(f"score gave NaN for {node.whole!r}.", remedy="Give a number; higher is better.")
        return score

    def _judge(self, node: Node, score: float) -> Node | None:
        """The branch that is known to have lost, now that this one has its score."""
        if node.state == "open":
            lost = node if self.plan.least is not None and score < self.plan.least else self._crowded_out(node)
            if lost is not None:
                lost.state = "pruned"
            return lost
        if self.plan.solved_at is not None and score >= self.plan.solved_at:
            self.ended = "solved"
        if self.best is not None and score <= _score(self.best):
            return node
        lost, self.best = self.best, node
        return lost

    def _crowded_out(self, node: Node) -> Node | None:
        """The step of this depth that `width` others are better than."""
        if self.plan.width is None:
            return None
        level = self._levels.setdefault(node.depth, [])
        level.append(node)
        if len(level) <= self.plan.width:
            return None
        worst = min(level, key=_rank)
        level.remove(worst)
        return worst

    async def _let_go(self, node: Node) -> None:
        """Closes a branch that lost, and those above it from which nothing hangs any more: what only they hold is free
        at once."""
        while node in self._held:
            self._held.discard(node)
            with anyio.CancelScope(shield=True):
                await node.branch.close()
            if self.plan.again or node.parent is None or not self._held.isdisjoint(node.parent.children):
                return
            node = node.parent


async def search(session: Session, prompt: Prompt, plan: Plan, grow: Callable[[Grower], Awaitable[None]]) -> Found:
    """Runs one kind of search inside its budget; leaves no branch open, whatever happens."""
    options, messages = checked(session, plan), messages_of(prompt)
    if plan.adopt:
        await check_free(session)
    grower = Grower(session, plan, options)
    try:
        with anyio.move_on_after(plan.budget.seconds) as scope:
            await grower.plant(messages)
            await grow(grower)
        if scope.cancelled_caught:
            grower.ended = "seconds"
        return await grower.harvest()
    finally:
        with anyio.CancelScope(shield=True):
            await grower.close()


def _ends_all(error: Exception) -> bool:
    """Also one of several that a task group of an own attempt raised together."""
    if isinstance(error, ExceptionGroup):
        return error.subgroup(_OF_ALL) is not None
    return isinstance(error, _OF_ALL)


def _score(node: Node) -> float:
    return -math.inf if node.score is None else node.score


def _rank(node: Node) -> tuple[float, int]:
    """Higher is better; of equal scores the older wins, whichever was scored first."""
    return _score(node), -node.number
