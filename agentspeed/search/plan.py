"""What one search is asked for, and the check of it: a wrong argument is named before anything is forked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

from agentspeed._base.validate import check_count, check_flag, check_number, check_seconds, is_whole
from agentspeed.errors import InvalidRequest, SessionBusy
from agentspeed.search.tree import Node
from agentspeed.session import Session

Score: TypeAlias = Callable[[Node], float | Awaitable[float]]
"""How good an attempt is; the largest wins."""
Keep: TypeAlias = Callable[[str], bool]
"""Asked about the text as it grows; False ends the attempt at once."""
Attempt: TypeAlias = Callable[[Session], Awaitable[str]]
"""One try on a branch, in your own words; what it returns is scored, and what it raises fails this try alone."""
Ended: TypeAlias = Literal["solved", "exhausted", "tokens", "seconds", "branches"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds of one search; None is unbounded. `tokens` bounds what is drawn and prefilled by the search; one that is
    used up before a branch draws anything, by what of the prompt and the context is not computed yet, is refused.

    An own attempt is not cut in its middle: none begins once the tokens are spent, the first runs alone, and then as
    many at once as fit when each takes what the largest so far took. So they pass the bound by no more than what the
    first takes, or later ones take beyond the largest before them."""

    tokens: int | None = None
    seconds: float | None = None
    branches: int | None = 256

    def __post_init__(self) -> None:
        check_count("Budget tokens", self.tokens, none=True)
        check_seconds("Budget seconds", self.seconds)
        check_count("Budget branches", self.branches, none=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all searches have in common.

    `score`: how good a branch is, higher is better. `solved_at`: the first finished branch that scores this much ends
    the search at once. `least`: a step that scores less is closed at once. `keep`: asked with the text as it grows;
    False closes the branch there. `attempt`: makes the branch's answer itself (for agents with tools) instead of one
    turn. `stop`: ends a step; None when every try is a whole answer. `width`: so many steps of one depth go on, None is
    all. `again`: a step may be gone on with more than once. `options` go to every turn."""

    score: Score
    budget: Budget
    solved_at: float | None = None
    least: float | None = None
    keep: Keep | None = None
    attempt: Attempt | None = None
    stop: str | None = None
    width: int | None = None
    again: bool = False
    at_once: int = 16
    temperature: float = 1.0
    seed: int = 0
    adopt: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def checked(session: Session, plan: Plan) -> dict[str, Any]:
    """The options of every turn. Raises `InvalidRequest` (`InvalidSampling` for how to draw) for what cannot be."""
    if not isinstance(session, Session):
        raise InvalidRequest(f"session is {session!r}; it must be a Session.")
    if not callable(plan.score):
        raise InvalidRequest(f"score is {plan.score!r}; it must be a function of a Node.")
    for name, call in (("keep", plan.keep), ("attempt", plan.attempt)):
        if call is not None and not callable(call):
            raise InvalidRequest(f"{name} is {call!r}; it must be a function, or None.")
    for name, bound in (("solved_at", plan.solved_at), ("least", plan.least)):
        if bound is not None:
            check_number(name, bound)
    if not isinstance(plan.budget, Budget):
        raise InvalidRequest(f"budget is {plan.budget!r}; it must be Budget(...), or None.")
    if not is_whole(plan.seed):
        raise InvalidRequest(f"seed is {plan.seed!r}; it must be a whole number.")
    check_count("at_once", plan.at_once)
    check_flag("adopt", plan.adopt)
    if plan.attempt is not None:
        _check_attempt(plan)
    return _turn_options(session, plan)


async def check_free(session: Session) -> None:
    """What the session would refuse at the end, once all the work is done, is refused now."""
    try:
        _ = await session.mark()
    except SessionBusy as busy:
        raise SessionBusy(
            busy.message,
            remedy="It cannot adopt the best branch meanwhile: give adopt=False, or search on a fork of it.",
        ) from busy


def _check_attempt(plan: Plan) -> None:
    """An own attempt asks for its own turns: nothing that is said of turns here would reach them."""
    ignored = [*plan.options, *(["keep"] if plan.keep is not None else [])]
    if ignored:
        raise InvalidRequest(
            f"attempt= makes its turns itself, so {', '.join(ignored)} would be ignored.",
            remedy="Give it to the turns that the attempt makes.",
        )


def _turn_options(session: Session, plan: Plan) -> dict[str, Any]:
    """Settled once as each turn will settle them, so that what a turn would refuse is refused now."""
    options: dict[str, Any] = {"temperature": plan.temperature, **plan.options}
    if plan.stop is not None:
        options["stop"] = plan.stop
    output = options.get("output", str)
    others: Any = {name: value for name, value in options.items() if name != "output"}
    session.check(output=output, **others)
    if plan.attempt is not None or not session.tools:
        return options
    offered = options.pop("tools", None)
    offered = session.tools if offered is None else offered
    if offered and options.get("tool_choice", "auto") != "none":
        names = ", ".join(tool.name for tool in session.tools)
        raise InvalidRequest(
            f"The session has the tools {names}, and a search's own turns run no tools.",
            remedy="Run them in attempt= of best_of_n, or give tools=[] to search among answers without calls.",
        )
    # The session's first message describes its tools: only the grammar of this choice keeps the model from calling.
    return {**options, "tool_choice": "none"}
