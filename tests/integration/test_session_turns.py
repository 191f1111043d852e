"""What a session promises about its turns, on every event loop, against a real engine process."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest
import sniffio

from agentspeed import Assistant, Sampling, Session, User, errors, events

pytestmark = pytest.mark.anyio


async def test_the_loop_that_runs_is_the_one_that_was_asked_for(anyio_backend: tuple[str, dict[str, bool]]) -> None:
    assert sniffio.current_async_library() == anyio_backend[0]
    if anyio_backend[0] == "asyncio":
        import asyncio

        assert ("uvloop" in type(asyncio.get_running_loop()).__module__) == anyio_backend[1]["use_uvloop"]


async def test_a_second_turn_computes_only_what_is_new(checkpoint: Path) -> None:
    async with Session(checkpoint, system="Be brief.", private=True) as s:
        first = await s.generate("Hello there.", max_tokens=9)
        assert first.finish_reason == "max_tokens"
        assert len(first.ids) == first.usage.drawn == 9
        assert first.text and first.output == first.text
        known = s.tokens
        second = await s.generate("Go on.", max_tokens=5)
        assert second.usage.resumed_device == known - 1
        assert second.usage.new == s.tokens - 5 - (known - 1)
        assert second.usage.recomputed == 0
        assert s.usage.drawn == 14 and s.usage.turns == 2
        assert s.usage.prefill_saved >= known - 1


async def test_events_come_in_order_and_add_up_to_the_reply(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, s.stream("Tell me.", max_tokens=12) as turn:
        seen = [event async for event in turn]
        reply = turn.result()
        assert isinstance(seen[0], events.TurnStarted) and isinstance(seen[-1], events.TurnFinished)
        assert "".join(event.text for event in seen if isinstance(event, events.TextDelta)) == reply.text
        assert [event.seq for event in seen] == list(range(seen[0].seq, seen[0].seq + len(seen)))
        assert {event.session_id for event in seen} == {s.id}


async def test_a_turn_is_read_inside_its_own_block_and_entered_once(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        turn = s.stream("Hello.", max_tokens=3)
        with pytest.raises(errors.SessionError, match="inside its own block"):
            _ = await anext(aiter(turn))
        async with turn:
            _ = await turn.reply()
        with pytest.raises(errors.SessionError, match="entered once"):
            async with turn:
                raise AssertionError("a turn was entered twice")


async def test_leaving_a_stream_early_puts_the_log_back_and_the_session_goes_on(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint) as undisturbed:
        _ = await s.generate("One.", max_tokens=4)
        _ = await undisturbed.generate("One.", max_tokens=4)
        before = s.ids, s.messages
        async with s.stream("Two.", max_tokens=2000) as turn:
            async for event in turn:
                if isinstance(event, events.TextDelta):
                    break
        assert (s.ids, s.messages) == before
        said = (await undisturbed.generate("Three.", max_tokens=8)).ids
        assert (await s.generate("Three.", max_tokens=8)).ids == said


async def test_cancelling_a_turn_anywhere_leaves_a_session_that_works(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("One.", max_tokens=2)
        before = s.ids
        for delay in (0, 0.0005, 0.002, 0.01, 0.05):
            with anyio.move_on_after(delay) as scope:
                _ = await s.generate("A long answer, please.", max_tokens=3000)
            assert scope.cancelled_caught
            assert s.ids == before
            assert (await s.inspect()).known == s.tokens
        assert (await s.generate("Two.", max_tokens=3)).usage.recomputed == 0


async def test_a_cancelled_turn_can_keep_its_partial_text(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        text = ""
        async with s.stream("Speak.", max_tokens=3000, keep_on_cancel=True) as turn:
            async for event in turn:
                if isinstance(event, events.TextDelta):
                    text += event.text
                if len(text) > 8:
                    break
        assert isinstance(s.messages[0], User)
        kept = s.messages[1]
        assert isinstance(kept, Assistant) and kept.text.startswith(text)
        reply = await s.generate("And now?", max_tokens=3)
        assert [type(message) for message in s.messages] == [User, Assistant, User, Assistant]
        assert reply.usage.recomputed == 0
        assert (await s.inspect()).known == s.tokens


async def test_a_timeout_cancels_the_turn_and_tells_the_partial_text(checkpoint: Path) -> None:
    async with Session(checkpoint, timeout=30) as s:
        before = s.ids
        with pytest.raises(errors.TurnTimeout) as caught:
            _ = await s.generate("Speak for long.", max_tokens=5000, timeout=0.1)
        assert caught.value.retryable
        assert s.ids == before
        assert (await s.generate("Briefly.", max_tokens=2)).usage.drawn == 2


async def test_one_turn_at_a_time_and_nothing_beside_it_but_a_fork(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, s.stream("Speak.", max_tokens=400) as turn:
        _ = await anext(turn)
        for attempt in (s.generate("Me too."), s.add("x"), s.rewind(0), s.mark(), s.expect(1.0), s.snapshot()):
            with pytest.raises(errors.SessionBusy):
                await attempt
        async with s.fork() as (child,):
            assert (await child.generate(max_tokens=3)).usage.drawn == 3
        assert (await turn.reply()).usage.drawn == 400


async def test_a_session_is_used_inside_its_block_only(checkpoint: Path) -> None:
    s = Session(checkpoint)
    with pytest.raises(errors.SessionClosed, match="not entered"):
        _ = await s.generate("Too early.")
    async with s:
        pass
    with pytest.raises(errors.SessionClosed):
        _ = await s.generate("Too late.")
    with pytest.raises(errors.SessionClosed):
        async with s:
            raise AssertionError("a session was entered twice")
    assert "closed" in repr(s)


async def test_leaving_a_session_never_hides_what_its_body_raised(checkpoint: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Session(checkpoint) as s, s.stream("Speak.", max_tokens=500) as turn:
            _ = await anext(turn)
            raise KeyError("mine")


async def test_a_refused_call_changes_nothing(checkpoint: Path) -> None:
    async with Session(checkpoint) as s:
        _ = await s.generate("One.", max_tokens=2)
        before = s.ids, s.messages
        with pytest.raises(errors.ContextOverflow):
            _ = await s.generate("far too long " * 40_000)
        with pytest.raises(errors.InvalidSampling, match="top_p"):
            _ = await s.generate("x", sampling=Sampling(top_p=1.5))
        with pytest.raises(errors.InvalidSampling, match="temperature"):
            _ = await s.generate("x", temperature=-1.0)
        with pytest.raises(errors.InvalidRequest, match="max_tokens"):
            _ = await s.generate("x", max_tokens=0)
        with pytest.raises(errors.InvalidRequest, match="Unknown options tempreture"):
            _ = await s.generate("x", tempreture=1.0)  # type: ignore[call-overload]
        with pytest.raises(errors.InvalidRequest, match="stop"):
            _ = await s.generate("x", stop="")
        with pytest.raises(errors.InvalidRequest, match="is no message"):
            _ = await s.generate(7)  # type: ignore[call-overload]
        with pytest.raises(errors.InvalidRequest, match="tool_choice"):
            _ = await s.generate("x", tool_choice="required")
        assert (s.ids, s.messages) == before
        assert (await s.generate("Two.", max_tokens=2)).usage.recomputed == 0


async def test_a_stop_text_ends_the_turn_and_stays_out_of_its_text(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint) as plain:
        whole = (await plain.generate("Say it.", max_tokens=24)).text
        stop = whole[5:8]
        async with s.stream("Say it.", max_tokens=24, stop=[stop, "never there"]) as turn:
            seen = "".join([event.text async for event in turn if isinstance(event, events.TextDelta)])
            reply = turn.result()
        assert reply.finish_reason == "stop_string"
        assert seen == reply.text == whole[: whole.index(stop)]


async def test_a_seed_repeats_a_turn_and_retries_differ_without_one(checkpoint: Path) -> None:
    async with Session(checkpoint, sampling=Sampling(temperature=1.0)) as s:
        mark = await s.mark()
        drawn = []
        for seed in (7, 7, None, None):
            drawn.append((await s.generate("Draw.", max_tokens=16, seed=seed)).ids)
            await s.rewind(mark)
        assert drawn[0] == drawn[1]
        assert len({drawn[0], drawn[2], drawn[3]}) == 3


async def test_logprobs_come_with_each_token_when_asked_for(checkpoint: Path) -> None:
    async with Session(checkpoint, record_logprobs=True) as s:
        reply = await s.generate("Say it.", max_tokens=4, logprobs=3)
        assert len(reply.logprobs) == len(reply.top_logprobs) == 4
        assert all(
            len(top) == 3 and top[0][1] == logprob
            for top, logprob in zip(reply.top_logprobs, reply.logprobs, strict=True)
        )
        path = s.trajectory()
        assert path.ids == s.ids and sum(path.made) == 4
        assert tuple(value for value, made in zip(path.logprobs, path.made, strict=True) if made) == reply.logprobs


async def test_the_distribution_that_drew_stands_beside_the_model_s_own(checkpoint: Path) -> None:
    """The behaviour policy: equal to the model's own where nothing changes it, and certain where the turn is greedy."""
    async with Session(checkpoint, record_logprobs=True) as s:
        plain = await s.generate("Say it.", max_tokens=4, temperature=1.0)
        assert plain.draw_logprobs == pytest.approx(plain.logprobs, abs=1e-9)
        greedy = await s.generate("Again.", max_tokens=4)
        assert greedy.draw_logprobs == (0.0,) * 4 != greedy.logprobs
        pair = await s.generate("Two.", max_tokens=4, sampling=Sampling(temperature=1.0, top_k=2), logprobs=2)
        for number, own, top in zip(pair.ids, pair.draw_logprobs, pair.top_logprobs, strict=True):
            likely = {other: math.exp(value) for other, value in top}
            assert math.exp(own) == pytest.approx(likely[number] / sum(likely.values()), abs=1e-6)
        path = s.trajectory()
        drawn = tuple(value for value, made in zip(path.draw_logprobs, path.made, strict=True) if made)
        assert drawn == plain.draw_logprobs + greedy.draw_logprobs + pair.draw_logprobs


async def test_penalties_and_a_bias_decide_what_is_drawn_whether_or_not_the_message_was_cut(checkpoint: Path) -> None:
    rule = Sampling(frequency_penalty=2.0, presence_penalty=1.0, repetition_penalty=1.5)
    async with Session(checkpoint, sampling=rule) as s, Session(checkpoint) as plain, Session(checkpoint) as biased:
        whole = await plain.generate("Count.", max_tokens=24, sampling=rule)
        assert len(set(whole.ids)) > len(set((await biased.generate("Count.", max_tokens=24)).ids))
        _ = await s.generate("Count.", max_tokens=7)
        async with s.fork() as children:
            assert (await children[0].generate(max_tokens=17)).ids == whole.ids[7:]
        assert (await s.generate(max_tokens=17)).ids == whole.ids[7:], "what stands in the message counts"
        likes = Sampling(logit_bias={whole.ids[3]: 100.0})
        assert (await biased.generate("Again.", max_tokens=5, sampling=likes)).ids == (whole.ids[3],) * 5
        with pytest.raises(errors.InvalidSampling, match="an id of logit_bias is 99999999"):
            _ = await biased.generate("No.", sampling=Sampling(logit_bias={99999999: 1.0}))


async def test_messages_can_be_added_and_their_rows_computed_ahead(checkpoint: Path) -> None:
    async with Session(checkpoint, private=True) as s:
        _ = await s.add("First.", Assistant("An answer."), "Second.", prefill=True)
        assert [type(message) for message in s.messages] == [User, Assistant, User]
        ahead = s.tokens
        reply = await s.generate(max_tokens=2)
        assert reply.usage.resumed_device >= ahead - 1
        assert s.usage.turns == 1
        _ = await s.add(Assistant("The end."))
        with pytest.raises(errors.InvalidRequest, match="nothing to answer"):
            _ = await s.generate(max_tokens=2)


async def test_a_message_cut_by_max_tokens_is_open_and_can_be_gone_on_with(checkpoint: Path) -> None:
    async with Session(checkpoint) as s, Session(checkpoint) as whole:
        _ = await s.generate("Count.", max_tokens=5)
        reply = await s.generate(max_tokens=5)
        assert reply.text == (await whole.generate("Count.", max_tokens=10)).text
        assert s.ids == whole.ids and s.messages == whole.messages


async def test_many_sessions_at_once_say_what_they_say_alone(checkpoint: Path) -> None:
    async def ask(number: int, replies: dict[int, tuple[int, ...]]) -> None:
        async with Session(checkpoint) as s:
            replies[number] = (await s.generate(f"Question {number}", max_tokens=6)).ids

    together: dict[int, tuple[int, ...]] = {}
    alone: dict[int, tuple[int, ...]] = {}
    async with anyio.create_task_group() as group:
        for number in range(12):
            _ = group.start_soon(ask, number, together)
    for number in range(0, 12, 5):
        await ask(number, alone)
    assert {number: together[number] for number in alone} == alone
