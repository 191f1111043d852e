"""What a step's result does to its branches: rows are acknowledged, tokens are appended, turns end."""

from __future__ import annotations

from typing import TypeAlias, assert_never

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branch_states import (
    AtRest,
    Decoding,
    Held,
    Next,
    Prefilling,
    Promoting,
    Queued,
    Settling,
    Then,
)
from agentspeed_engine.protocol.messages import FinishReason, Tokens, TopLogprob
from agentspeed_engine.protocol.token_ids import pack_id
from agentspeed_engine.sched.admission import target
from agentspeed_engine.sched.plan import Drawn, Row, StepResult
from agentspeed_engine.sched.state import SchedulerState

_Refusal: TypeAlias = tuple[str, bool]
"""Why a turn cannot go on, and whether that is because its logits are no finite numbers."""


def apply(world: SchedulerState, result: StepResult, now: float) -> None:
    """In sequence order only. Rows of an epoch that is over are ignored, and counted."""
    if not world.flights or result.seq != next(iter(world.flights)):
        raise BrokenInvariant(f"the result of step {result.seq} came out of order")
    step = world.flights.pop(result.seq)
    drawn = {(token.branch, token.epoch): token for token in result.drawn}
    refused = {(branch, epoch): (reason, (branch, epoch) in result.spoilt) for branch, epoch, reason in result.refused}
    for row in step.rows:
        key = (row.branch, row.epoch)
        _row_came_back(world, row, drawn.get(key), refused.get(key), now)


def prepared(world: SchedulerState, turn: int, refusal: str | None, now: float) -> None:
    """The executor is ready for a turn, which takes its place in the queue by its age; or the turn cannot be served."""
    number = world.preparing.get(turn)
    if number is None:
        return  # it was cancelled or closed meanwhile
    state = world.states[number]
    assert isinstance(state, Queued)
    world.dequeue(state.turn, state.branch)
    state.turn.waits = False
    if refusal is None:
        state.turn.prepared = True
        world.enqueue(state)
        return
    state.turn.end, state.turn.message = "error", refusal
    held = state.abort()
    world.rest(held)
    world.finish_turn(held.branch, state.turn, now)


def _row_came_back(world: SchedulerState, row: Row, token: Drawn | None, refusal: _Refusal | None, now: float) -> None:
    state = world.states.get(row.branch)
    if state is None or state.branch.epoch != row.epoch:
        world.ignored += 1
        return
    count = row.tokens
    match state:  # the most usual first
        case Decoding():
            state.commit(world.kv, count)
            _draw(world, state, token, refusal, now)
        case Settling():
            _computed(state, row)
            turn = state.turn
            turn.spoilt |= refusal is not None and refusal[1]
            match state.ack(world.kv, count, now):
                case Settling() as settling:
                    world.states[row.branch] = settling
                case AtRest() as landed:
                    world.land(row.branch, turn, landed, now)
        case Prefilling():
            _computed(state, row)
            state.commit(world.kv, count)
            if row.sample is not None:
                _filled(world, state, token, refusal, now)
            elif state.turn.max_tokens == 0 and state.room.done >= target(state.turn, state.branch):
                state.turn.filled_at = now
                _end(world, state, "max_tokens", now)
        case Held() | Queued() | Promoting():
            world.ignored += 1
        case _:
            assert_never(state)


def _computed(state: Prefilling | Settling, row: Row) -> None:
    """Counts rows of a prompt."""
    if state.turn.filled_at is None:
        state.turn.computed(row.position, row.end, state.branch.computed)


def _filled(
    world: SchedulerState, state: Prefilling, token: Drawn | None, refusal: _Refusal | None, now: float
) -> None:
    """The prompt is computed: what others wait for is published before anything is drawn, unless it is spoilt."""
    if refusal is None or not refusal[1]:
        state.seal(world.kv, now)
    if state.turn.filled_at is None:
        state.turn.filled_at = now
    decoding = state.filled()
    world.states[decoding.branch.id] = decoding
    _draw(world, decoding, token, refusal, now)


def _draw(world: SchedulerState, state: Decoding, token: Drawn | None, refusal: _Refusal | None, now: float) -> None:
    branch, turn = state.branch, state.turn
    if refusal is not None:
        turn.message, turn.spoilt = refusal
        _end(world, state, "error", now)
        return
    if token is None:
        raise BrokenInvariant(f"branch {branch.id} was to draw a token and none came")
    branch.log.append((token.id,))
    turn.drawn += 1
    world.tell(
        branch,
        Tokens(
            branch=branch.id,
            ids=pack_id(token.id),
            logprobs=() if token.logprob is None else (token.logprob,),
            top=(tuple(TopLogprob(id=other, logprob=logprob) for other, logprob in token.top),) if token.top else (),
            draw_logprobs=() if token.draw_logprob is None else (token.draw_logprob,),
        ),
    )
    if token.id in turn.spec.stop_ids:
        _end(world, state, "stop_id", now)
    elif token.end is not None:
        _end(world, state, token.end, now)
    elif turn.drawn >= turn.max_tokens:
        _end(world, state, "max_tokens", now)


def _end(world: SchedulerState, state: Prefilling | Decoding, reason: FinishReason, now: float) -> None:
    state.turn.end = reason
    world.leave(state, Then(Next.HOLD), now)


__all__ = ["BranchId", "apply", "prepared"]
