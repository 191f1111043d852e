"""What each command of a front does to its branch, decided by the state it finds."""

from __future__ import annotations

import math
from array import array
from typing import assert_never

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import BranchId, LinkId, SessionId
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import (
    BranchState,
    Decoding,
    Held,
    Next,
    Prefilling,
    Promoting,
    Queued,
    Settling,
    Then,
)
from agentspeed_engine.kv.token_log import Log
from agentspeed_engine.kv.tree import tenant_of
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import (
    Adopt,
    Append,
    Cancel,
    Close,
    Done,
    Expect,
    Fork,
    Forked,
    Generate,
    Inspect,
    Inspected,
    LeaseAnswer,
    Open,
    Opened,
    Rewind,
)
from agentspeed_engine.protocol.sampling import counts_log, counts_message, validate_sampling
from agentspeed_engine.protocol.token_ids import unpack_ids
from agentspeed_engine.sched import leases, places, quotas
from agentspeed_engine.sched.inspection import waiting_for
from agentspeed_engine.sched.pause_model import PauseModel
from agentspeed_engine.sched.redaction import MAX_NAME, usable_name
from agentspeed_engine.sched.state import SchedulerState, Session, Waiting

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_TOOLS = 256
"""Tools whose pauses are learnt apart; a front may name any number."""


def open_session(world: SchedulerState, link: LinkId, command: Open, now: float) -> None:
    config = world.config
    if len(world.sessions) >= config.max_sessions:
        raise EngineFault("too_many_sessions", f"{config.max_sessions} sessions are open.", "Close one, or wait.")
    ids = _ids(world, command.ids)
    if len(ids) > config.context_limit:
        raise _overflow(world, len(ids))
    if command.computed < 0:
        raise EngineFault("invalid_request", f"computed is {command.computed}.", "Give 0 or more.")
    _check_name("tenant", command.tenant)
    _check_name("session", command.label)
    quotas.check_session(world, command.tenant)
    number = world.fresh_branch()
    key = (config.model, config.adapter, f"{command.tenant}\0{number if command.private else ''}")
    log = Log()
    log.append(ids)
    branch = Branch(
        id=number,
        session=SessionId(number),
        link=link,
        root=key,
        private=command.private,
        draw_seed=command.seed,
        log=log,
        leaf=world.kv.tree.root(key),
        rested_at=now,
        computed=min(command.computed, len(ids)),
        lost_why="the engine was started anew" if command.computed else "",
    )
    branch.leaf.leaf_of.add(number)
    world.kv.join(branch)
    world.kv.open_at(branch)
    world.sessions[SessionId(number)] = Session(link, command.tenant, {number}, command.label)
    world.rest(Held(branch))
    world.tell(branch, Opened(request=command.request, branch=number, residence=world.residence(branch)))


def append(world: SchedulerState, link: LinkId, command: Append, now: float) -> None:
    held = _at_rest(world, link, command.branch)
    ids = _ids(world, command.ids)
    if held.branch.known + len(ids) > world.config.context_limit:
        raise _overflow(world, held.branch.known + len(ids))
    held = held.append(ids)
    world.rest(held)
    world.tell(held.branch, Done(request=command.request, known=held.branch.known))


def generate(world: SchedulerState, link: LinkId, command: Generate, now: float) -> None:
    config = world.config
    held = _at_rest(world, link, command.branch)
    branch = held.branch
    ids = _ids(world, command.ids)
    known = branch.known + len(ids)
    left, bound = _room_of_turn(world, branch, command, known)
    _check_turn(world, command, known)
    wanted = left if command.max_tokens is None else min(command.max_tokens, left)
    _learn_pause(world, branch, now)
    held = held.append(ids)
    world.next_turn += 1
    world.next_age += 1
    age, enters = places.taken(world, world.sessions[branch.session])
    _ = world.rested.pop(branch.id, None)
    spec = _spec(world.next_turn, branch, command)
    waits = config.prepares and (command.grammar is not None or bool(command.stop_strings))
    if waits:
        world.unprepared.append(spec)
    world.enqueue(
        held.enqueue(
            Turn(
                spec=spec,
                age=age,
                enters=enters,
                max_tokens=wanted,
                queued_at=now,
                waits=waits,
                bound="" if wanted == command.max_tokens else bound,
            )
        )
    )
    world.tell(branch, Done(request=command.request, known=known))


def _check_turn(world: SchedulerState, command: Generate, known: int) -> None:
    """Raises what a turn after `known` ids is refused for, for which there is room."""
    config, stops = world.config, command.stop_strings
    if known == 0:
        raise EngineFault("invalid_request", "The branch has no ids to compute from.", "Add a message first.")
    if command.max_tokens is not None and command.max_tokens < 0:
        raise EngineFault("invalid_request", f"max_tokens is {command.max_tokens}.", "Give 0 (prefill only) or more.")
    if world.waiting_turns >= config.max_waiting:
        raise EngineFault("overloaded", f"{config.max_waiting} turns are waiting.", "Try again later.")
    validate_sampling(command.sampling, config.vocab_size)
    if len(stops) > MAX_STOP_STRINGS or sum(map(len, stops)) > MAX_STOP_BYTES:
        raise EngineFault(
            "invalid_request",
            "Too many or too long stop strings.",
            f"At most {MAX_STOP_STRINGS} of {MAX_STOP_BYTES} bytes together.",
        )
    if any(not stop for stop in stops):
        raise EngineFault("invalid_request", "A stop string is empty.", "Leave it out.")
    counts = {
        "The grammar is to consume": 0 if command.grammar is None else command.grammar.consumed,
        "Stop strings are to consume": command.stop_consumed,
        "Penalties are to count": command.penalty_consumed,
    }
    for what, count in counts.items():
        if not 0 <= count <= known:
            raise EngineFault("invalid_request", f"{what} {count} of {known} ids.", "Name ids that the branch has.")


def _room_of_turn(world: SchedulerState, branch: Branch, command: Generate, known: int) -> tuple[int, str]:
    """Tokens that may come after `known`, and what bounds them. Raises `EngineFault` where there is no room for one,
    or, if none is asked for, for what is known."""
    config, least = world.config, 0 if command.max_tokens == 0 else 1
    left, within = config.context_limit - known, quotas.check_turn(world, branch, known, least)
    if left < least:
        raise _overflow(world, known)
    if within < left:
        return within, f"the tenant's quota of {config.tenant_pages} pages"
    return left, f"the context limit of {config.context_limit} tokens"


def _spec(number: int, branch: Branch, command: Generate) -> TurnSpec:
    """Of a turn over all that the branch knows."""
    log, known, sampling = branch.log, branch.known, command.sampling
    consumed = 0
    if command.grammar is not None:
        consumed = command.grammar.consumed
    elif command.stop_strings:
        consumed = command.stop_consumed
    own_key = (branch.draw_seed, branch.serial + 1, branch.child_index)
    return TurnSpec(
        turn=number,
        branch=branch.id,
        sampling=sampling,
        draw_key=own_key if command.seed is None else (command.seed, 0, 0),
        stop_strings=command.stop_strings,
        grammar=command.grammar,
        consumed_ids=tuple(log.ids(known - consumed, known)) if consumed else (),
        prompt_tokens=known,
        stop_ids=frozenset(command.stop_ids),
        seen=log.packed(0, known) if counts_log(sampling) else b"",
        counted=log.packed(known - command.penalty_consumed, known) if counts_message(sampling) else b"",
    )


def cancel(world: SchedulerState, link: LinkId, command: Cancel, now: float) -> None:
    state = _state(world, link, command.branch)
    known = state.branch.known
    if command.cut is not None and not 0 <= command.cut <= known:
        raise EngineFault("position_unknown", f"The branch knows {known} tokens, not {command.cut}.")
    wait = Waiting(link, command.request, command.cut, ())
    match state:
        case Held():
            if command.cut is not None and command.cut < known:
                state = state.rewind(world.kv, command.cut)
                world.rest(state)
            world.tell(state.branch, Done(request=command.request, known=state.branch.known))
        case Queued():
            state.turn.end = "cancelled"
            world.dequeue(state.turn, state.branch)
            held = state.abort()
            if command.cut is not None and command.cut < known:
                held = held.rewind(world.kv, command.cut)
            world.rest(held)
            world.finish_turn(held.branch, state.turn, now)
            world.tell(held.branch, Done(request=command.request, known=held.branch.known))
        case Promoting() | Prefilling() | Decoding():
            state.turn.end = "cancelled"
            world.waiting.setdefault(state.branch.id, []).append(wait)
            world.leave(state, Then(Next.HOLD), now)
        case Settling():
            state.turn.end = state.turn.end or "cancelled"
            number = state.branch.id
            world.waiting.setdefault(number, []).append(wait)
            world.states[number] = state.strengthen(Then(Next.HOLD))
        case _:
            assert_never(state)


def fork(world: SchedulerState, link: LinkId, command: Fork, now: float) -> None:
    state = _state(world, link, command.branch)
    branch = state.branch
    number = branch.id
    session = world.sessions[branch.session]
    limit = world.config.max_branches
    if command.n < 1:
        raise EngineFault("invalid_request", f"A fork into {command.n}.", "Ask for at least one child.")
    if command.n >= limit:
        raise EngineFault(
            "invalid_request",
            f"A fork into {command.n}: a session has at most {limit} branches, the one that is forked among them.",
            f"Ask for {limit - 1} children at most." if limit > 1 else "Start the engine with a larger `max_branches`.",
        )
    if len(session.branches) + command.n + _unborn(world, branch) > limit:
        raise EngineFault("too_many_branches", f"A session has at most {limit} branches.", "Close some first.")
    if command.at is not None and (not isinstance(state, Held) or not 0 <= command.at <= branch.known):
        raise EngineFault(
            "position_unknown",
            f"Cannot fork at token {command.at} of {branch.known}.",
            "`at` is a position of a branch at rest.",
        )
    children = tuple([world.fresh_branch() for _ in range(command.n)])
    match state:
        case Held():
            state, born = state.fork(world.kv, children)
            world.rest(state)
            for child in born:
                if command.at is not None:
                    child = child.rewind(world.kv, command.at)
                world.adopt_child(child)
            world.tell(
                branch,
                Forked(
                    request=command.request, branches=children, known=branch.known if command.at is None else command.at
                ),
            )
        case Queued():
            turn = state.turn
            world.dequeue(turn, state.branch)
            state, born = state.fork(world.kv, children)
            for child in born:
                child.branch.rested_at = now  # the queue is no pause: its session was heard of just now
                world.adopt_child(child)
            world.enqueue(state)
            world.tell(branch, Forked(request=command.request, branches=children, known=branch.known))
        case Promoting() | Prefilling() | Decoding():
            world.waiting.setdefault(number, []).append(Waiting(link, command.request, None, children))
            world.leave(state, Then(Next.REQUEUE, children), now)
        case Settling():
            world.waiting.setdefault(number, []).append(Waiting(link, command.request, None, children))
            world.states[number] = state.strengthen(Then(Next.REQUEUE, children))
        case _:
            assert_never(state)


def rewind(world: SchedulerState, link: LinkId, command: Rewind, now: float) -> None:
    held = _at_rest(world, link, command.branch)
    if not 0 <= command.tokens <= held.branch.known:
        raise EngineFault("position_unknown", f"The branch knows {held.branch.known} tokens, not {command.tokens}.")
    held = held.rewind(world.kv, command.tokens)
    world.rest(held)
    world.tell(held.branch, Done(request=command.request, known=held.branch.known))


def adopt(world: SchedulerState, link: LinkId, command: Adopt, now: float) -> None:
    held = _at_rest(world, link, command.branch)
    child = _at_rest(world, link, command.child)
    if child.branch.trunk is None or child.branch.trunk[0] != held.branch.id:
        raise EngineFault(
            "child_unrelated",
            f"Branch {command.child} was not forked from {command.branch}.",
            "Adopt a child of this very branch.",
        )
    if child.branch.trunk[1] != held.branch.moves:
        raise EngineFault(
            "trunk_moved",
            "The trunk has moved since the fork.",
            "Adopt before the trunk goes on, or go on with the child instead.",
        )
    gone = child.branch
    given = world.leases[gone.id] if gone.id in world.firm else None
    held, _ = held.adopt(world.kv, child, now)
    world.rest(held)
    world.forget(gone)
    world.tell(held.branch, Done(request=command.request, known=held.branch.known))
    leases.take_over_firm(world, held.branch, given)


def close(world: SchedulerState, link: LinkId, command: Close, now: float) -> None:
    state = _state(world, link, command.branch)
    _close(world, state, Waiting(link, command.request, None, ()), now)


def drop_link(world: SchedulerState, link: LinkId, now: float) -> None:
    """The front died: all its branches close, as fast as their rows in flight allow."""
    for session in [session for session in world.sessions.values() if session.link == link]:
        session.orphaned = True
        for number in sorted(session.branches):
            _close(world, world.states[number], None, now)


def _close(world: SchedulerState, state: BranchState, wait: Waiting | None, now: float) -> None:
    branch = state.branch
    number, known = branch.id, branch.known
    match state:
        case Held():
            _ = state.close(world.kv, now)
            world.forget(branch)
        case Queued():
            state.turn.end = "closed"
            world.dequeue(state.turn, state.branch)
            _ = state.close(world.kv, now)
            world.finish_turn(branch, state.turn, now)
            world.forget(branch)
        case Promoting() | Prefilling() | Decoding():
            if wait is not None:
                world.waiting.setdefault(number, []).append(wait)
            state.turn.end = "closed"
            world.leave(state, Then(Next.CLOSE), now)
            return
        case Settling():
            if wait is not None:
                world.waiting.setdefault(number, []).append(wait)
            state.turn.end = "closed"
            world.states[number] = state.strengthen(Then(Next.CLOSE))
            return
        case _:
            assert_never(state)
    if wait is not None:
        world.out.append((wait.link, Done(request=wait.request, known=known)))


def expect(world: SchedulerState, link: LinkId, command: Expect, now: float) -> None:
    held = _at_rest(world, link, command.branch)
    if command.seconds is None and command.keep == "firm":
        raise EngineFault("invalid_request", "A firm lease needs an end.", "Say for how many seconds.")
    if command.seconds is not None and (not math.isfinite(command.seconds) or command.seconds < 0):
        raise EngineFault("invalid_request", f"seconds is {command.seconds}.", "Give a finite number, 0 or more.")
    _check_name("tool", command.tool)
    lease = leases.grant(world, held.branch, command, now)
    world.tell(held.branch, LeaseAnswer(request=command.request, lease=lease))


def inspect(world: SchedulerState, link: LinkId, command: Inspect, now: float) -> None:
    state = _state(world, link, command.branch)
    world.tell(
        state.branch,
        Inspected(
            request=command.request,
            state=type(state).__name__,
            known=state.branch.known,
            residence=world.residence(state.branch),
            lease=world.leases.get(state.branch.id),
            waiting_for=waiting_for(world, state),
            tenant_pages=world.kv.tree.owned.get(tenant_of(state.branch.root), 0),
            tenant_quota=world.config.tenant_pages,
        ),
    )


def _state(world: SchedulerState, link: LinkId, number: int) -> BranchState:
    state = world.states.get(BranchId(number))
    if state is None or state.branch.link != link:
        raise EngineFault("branch_unknown", f"There is no branch {number} on this link.", "Open a session first.")
    if isinstance(state, Settling) and state.then.next is Next.CLOSE:
        raise EngineFault("branch_closed", f"Branch {number} is being closed.")
    return state


def _at_rest(world: SchedulerState, link: LinkId, number: int) -> Held:
    state = _state(world, link, number)
    if not isinstance(state, Held):
        raise EngineFault("branch_busy", f"Branch {number} has a turn running.", "Wait for it, cancel it, or fork.")
    return state


def _check_name(what: str, text: str) -> None:
    if not usable_name(text):
        raise EngineFault(
            "invalid_request",
            f"The name of a {what} has {len(text)} characters or a NUL.",
            f"At most {MAX_NAME} characters, none of them NUL.",
        )


def _ids(world: SchedulerState, packed: bytes) -> array[int]:
    if len(packed) % 4:
        raise EngineFault("invalid_request", "ids are not a whole number of uint32.")
    ids = unpack_ids(packed)
    if ids and max(ids) >= world.config.vocab_size:
        raise EngineFault(
            "invalid_request",
            f"id {max(ids)} is outside the vocabulary of {world.config.vocab_size}.",
            "Use the tokenizer of this model.",
        )
    return ids


def _overflow(world: SchedulerState, tokens: int) -> EngineFault:
    return EngineFault(
        "context_overflow",
        f"{tokens} tokens leave no room in a context of {world.config.context_limit}.",
        "Rewind, start a new session, or serve the model with a larger context limit.",
    )


def _unborn(world: SchedulerState, branch: Branch) -> int:
    if not world.waiting:
        return 0
    return sum(
        len(wait.children)
        for number in world.sessions[branch.session].branches
        for wait in world.waiting.get(number, ())
    )


def _learn_pause(world: SchedulerState, branch: Branch, now: float) -> None:
    """A branch that had a turn before was paused until now."""
    tool = world.tools.pop(branch.id, "")
    if branch.serial:
        world.law.observe(max(0.0, now - branch.rested_at))
        if tool and (tool in world.tool_laws or len(world.tool_laws) < MAX_TOOLS):
            world.tool_laws.setdefault(tool, PauseModel()).observe(max(0.0, now - branch.rested_at))
    world.end_lease(branch.id)
