"""The client's end of a link: whatever the engine sends, or a listener does with it, nobody waits for ever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import anyio
import pytest

from agentspeed import errors
from agentspeed.transport.base import wire
from agentspeed.transport.socket_link import SocketLink, open_link
from agentspeed_engine.protocol import frames
from agentspeed_engine.protocol.codes import Code
from agentspeed_engine.protocol.frames import command_reader, encode_outbox

pytestmark = pytest.mark.anyio
Answer = Callable[[wire.Command], "tuple[wire.Outgoing, ...] | bytes"]


def welcome(request: int) -> wire.Welcome:
    return wire.Welcome(
        request=request,
        protocol=wire.PROTOCOL,
        engine="fake",
        model="m",
        vocab_size=9,
        context_limit=99,
        page_tokens=8,
        pages=9,
        host_slots=0,
        pid=1,
        limits={},
    )


class Engine:
    """The other end, in a thread: greets, and answers every other command with what `answer` gives."""

    def __init__(self, answer: Answer) -> None:
        self.client, self.peer = socket.socketpair()
        self.commands: list[wire.Command] = []
        self.reads = threading.Event()
        self.reads.set()
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def say(self, *messages: wire.Outgoing) -> None:
        self.peer.sendall(encode_outbox(messages))

    def _serve(self) -> None:
        reader = command_reader()
        while True:
            try:
                data = self.peer.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            reader.feed(data)
            for command in reader:
                self.commands.append(command)
                answer = (welcome(command.request),) if isinstance(command, wire.Hello) else self._answer(command)
                if answer:
                    self.peer.sendall(answer if isinstance(answer, bytes) else encode_outbox(answer))
                _ = self.reads.wait(30)

    def close(self) -> None:
        self.reads.set()
        # Closing alone ends no `recv` that another thread is in, and the link would hear of no end.
        with suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)
        self.peer.close()
        self.client.close()


def done(command: wire.Command) -> tuple[wire.Outgoing, ...]:
    return (wire.Done(request=command.request),)


def nothing(command: wire.Command) -> tuple[wire.Outgoing, ...]:
    return ()


@asynccontextmanager
async def linked(answer: Answer = done) -> AsyncIterator[tuple[SocketLink, Engine]]:
    engine = Engine(answer)
    link = await SocketLink.connect(engine.client, "test")
    try:
        yield link, engine
    finally:
        link.close()
        engine.close()


def rewind(number: int) -> wire.Command:
    return wire.Rewind(request=number, branch=1, tokens=0)


def tokens(branch: int) -> wire.Tokens:
    return wire.Tokens(branch=branch, ids=b"\0\0\0\0")


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not true():  # noqa: ASYNC110 - another thread brings it about
            await anyio.sleep(0.01)


# ---- what must not end the reader ------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x02\x00\x00\x00\x91\xa1"])
async def test_a_frame_that_does_not_decode_ends_the_link_and_everyone_is_told(bad: bytes) -> None:
    async with linked(lambda command: encode_outbox((wire.Done(request=command.request),)) + bad) as (link, _):
        heard: list[wire.Event | None] = []
        link.listen(7, heard.append)
        assert isinstance(await link.call(rewind), wire.Done), "the frame before it was good"
        await until(lambda: heard == [None])
        assert not link.alive
        with pytest.raises(errors.EngineDied, match="no frame of the protocol"):
            _ = await link.call(rewind)


@pytest.mark.parametrize("code", ["out_of_memory", "device_lost", "engine_stopping"])
async def test_an_engine_that_ends_by_a_fault_of_the_world_died_and_says_why(code: Code) -> None:
    async with linked() as (link, engine):
        heard: list[wire.Event | None] = []
        link.listen(7, heard.append)
        engine.say(wire.Failed(request=0, code=code, message="The GPU has no room.", remedy="Give fewer pages."))
        engine.peer.shutdown(socket.SHUT_WR)
        await until(lambda: heard == [None])
        with pytest.raises(errors.EngineDied, match="no room") as caught:
            _ = await link.call(rewind)
        assert caught.value.retryable and caught.value.remedy == "Give fewer pages."


async def test_a_call_that_waits_hears_of_a_frame_that_does_not_decode() -> None:
    async with linked(lambda command: b"\x01\x00\x00\x00\xc1") as (link, _):
        with anyio.fail_after(10), pytest.raises(errors.EngineDied, match="no frame of the protocol"):
            _ = await link.call(rewind)


async def test_a_listener_that_raises_ends_its_own_branch_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as (link, engine):
        raised: list[tuple[wire.Event | None, errors.AgentspeedError | None]] = []
        heard: list[wire.Event | None] = []

        def broken(event: wire.Event | None) -> None:
            raised.append((event, link.why_dead))
            if event is not None:
                raise ValueError("a bug in one listener")

        link.listen(7, broken)
        link.listen(8, heard.append)
        engine.say(tokens(7), tokens(8))
        engine.say(tokens(7), tokens(8))
        await until(lambda: len(heard) == 2)
        assert [event for event, _ in raised] == [tokens(7), None]
        assert isinstance(raised[1][1], errors.InternalError) and "a bug in one listener" in str(raised[1][1])
        assert link.alive and link.why_dead is None
        assert isinstance(await link.call(rewind), wire.Done)
        closed = [command.branch for command in engine.commands if isinstance(command, wire.Close)]
        assert closed == [7], "the engine is told that nobody listens any more"
        assert "a bug in one listener" in caplog.text


async def test_a_listener_that_raises_at_the_end_keeps_no_other_from_hearing_it() -> None:
    async with linked() as (link, engine):
        heard: list[wire.Event | None] = []

        def broken(event: wire.Event | None) -> None:
            raise ValueError("a bug at the end")

        link.listen(7, broken)
        link.listen(8, heard.append)
        engine.close()
        await until(lambda: heard == [None])


async def test_a_call_whose_reply_handler_raises_raises_and_the_link_goes_on() -> None:
    async with linked() as (link, _):

        def broken(reply: wire.Reply) -> None:
            raise KeyError("a bug in a reply handler")

        with pytest.raises(errors.InternalError, match="a bug in a reply handler") as caught:
            _ = await link.call(rewind, broken)
        assert isinstance(caught.value.__cause__, KeyError)
        assert isinstance(await link.call(rewind), wire.Done)


# ---- what cannot be sent ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda number: wire.Hello(request=number, client="\ud800"),
        lambda number: wire.Rewind(request=number, branch=1 << 64, tokens=0),
        lambda number: wire.Open(request=number, ids=bytes(300)),
    ],
    ids=["a lone surrogate", "a number of 65 bits", "too many ids"],
)
async def test_a_command_that_no_frame_carries_is_refused_and_nothing_is_lost(
    make: Callable[[int], wire.Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked() as (link, engine):
        monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 250)
        with pytest.raises(errors.InvalidRequest):
            _ = await link.call(make)
        assert isinstance(await link.call(rewind), wire.Done)
        assert [type(command) for command in engine.commands] == [wire.Hello, wire.Rewind]


# ---- patience --------------------------------------------------------------------------------------------------------
@pytest.fixture
def clock() -> Iterator[Callable[[], float]]:
    begun = time.monotonic()
    yield lambda: time.monotonic() - begun


async def test_an_engine_that_is_silent_is_given_up_after_the_patience_and_not_twice_of_it(
    clock: Callable[[], float],
) -> None:
    async with linked(nothing) as (link, _):
        begun = clock()
        with pytest.raises(errors.EngineDied, match=r"did not answer for 0\.6 s; its link was closed"):
            _ = await link.call(rewind, patience=0.6)
        assert 0.5 < clock() - begun < 1.1
        assert not link.alive


async def test_a_call_that_keeps_its_link_is_given_up_alone() -> None:
    answers = False

    def later(command: wire.Command) -> tuple[wire.Outgoing, ...]:
        return done(command) if answers else ()

    async with linked(later) as (link, _):
        with pytest.raises(errors.EngineDied, match="did not answer"):
            _ = await link.call(rewind, patience=0.3, keep_link=True)
        assert link.alive
        answers = True
        assert isinstance(await link.call(rewind, patience=5.0), wire.Done)


async def test_an_engine_that_lives_is_waited_for() -> None:
    held: list[int] = []

    def slow(command: wire.Command) -> tuple[wire.Outgoing, ...]:
        if isinstance(command, wire.GetStats):
            return (wire.Stats(request=command.request, counts={}, seconds={}),)
        held.append(command.request)
        return ()

    async with linked(slow) as (link, engine), anyio.create_task_group() as group:

        async def answer() -> None:
            await anyio.sleep(1.5)
            engine.say(wire.Done(request=held[0]))

        group.start_soon(answer)
        assert isinstance(await link.call(rewind, patience=0.4), wire.Done)


async def test_a_frame_that_the_engine_does_not_read_is_bounded_by_the_patience_too(clock: Callable[[], float]) -> None:
    async with linked(done) as (link, engine):
        engine.reads.clear()
        _ = await link.call(rewind)
        begun = clock()
        with pytest.raises(errors.EngineDied):
            _ = await link.call(lambda number: wire.Open(request=number, ids=bytes(8 << 20)), patience=0.6)
        assert clock() - begun < 2.0


async def test_frames_that_wait_for_the_engine_to_read_arrive_whole_and_in_order() -> None:
    async with linked(done) as (link, engine):
        engine.reads.clear()
        _ = await link.call(rewind)
        async with anyio.create_task_group() as group:
            for size in (4 << 20, 8, 1 << 20, 16, 24):
                group.start_soon(link.call, lambda number, size=size: wire.Open(request=number, ids=bytes(size)))
                await anyio.wait_all_tasks_blocked()
            link.post(lambda number: wire.Close(request=number, branch=5))
            engine.reads.set()
        _ = await link.call(rewind)
        sizes = [len(command.ids) for command in engine.commands if isinstance(command, wire.Open)]
        assert sizes == [4 << 20, 8, 1 << 20, 16, 24]
        assert isinstance(engine.commands[-2], wire.Close)


async def test_an_event_loop_that_was_busy_is_no_silent_engine() -> None:
    async with linked(done) as (link, _), anyio.create_task_group() as group:

        async def busy() -> None:
            time.sleep(1.0)  # noqa: ASYNC251 - the point: the loop stands still

        group.start_soon(busy)
        assert isinstance(await link.call(rewind, patience=0.4), wire.Done)


async def test_what_comes_while_the_event_loop_is_busy_is_heard_in_order_and_its_end_last() -> None:
    heard: list[bytes | None] = []
    sent = [number.to_bytes(4, "little") for number in range(200)]
    async with linked() as (link, engine):
        link.listen(1, lambda event: heard.append(event.ids if isinstance(event, wire.Tokens) else None))

        def say_all() -> None:
            for ids in sent:
                engine.say(wire.Tokens(branch=1, ids=ids, logprobs=(0.0,) * 2000))  # more than a socket holds
            engine.peer.shutdown(socket.SHUT_WR)

        saying = threading.Thread(target=say_all)
        saying.start()
        saying.join(0.05)  # the event loop does nothing meanwhile
        await until(lambda: heard and heard[-1] is None)
        saying.join()
    assert heard == [*sent, None]


def test_a_link_whose_event_loop_is_over_ends_when_the_engine_says_more() -> None:
    engine = Engine(done)

    async def leave() -> SocketLink:
        return await SocketLink.connect(engine.client, "test")

    link = anyio.run(leave)
    with suppress(OSError):  # the end may come while more is said
        while link.alive:
            engine.say(tokens(1))
    engine.close()
    assert not link.alive


async def test_a_branch_that_was_opened_for_a_call_that_was_given_up_is_closed() -> None:
    async with linked(nothing) as (link, engine):
        with pytest.raises(errors.EngineDied):
            _ = await link.call(lambda number: wire.Open(request=number), patience=0.2, keep_link=True)
        late = next(command.request for command in engine.commands if isinstance(command, wire.Open))
        engine.say(wire.Opened(request=late, branch=77, residence=wire.Residence()))
        await until(lambda: any(isinstance(command, wire.Close) for command in engine.commands))
        assert next(command.branch for command in engine.commands if isinstance(command, wire.Close)) == 77


# ---- opening ---------------------------------------------------------------------------------------------------------
async def test_whoever_is_cancelled_while_an_engine_starts_waits_no_longer_and_leaves_no_socket() -> None:
    class Slow:
        def __init__(self) -> None:
            self.wanted = 0
            self.go = threading.Event()
            self.made: list[socket.socket] = []

        def want(self, change: int) -> None:
            self.wanted += change

        def open(self, *, after_death: bool) -> socket.socket:
            _ = self.go.wait(20)
            ours, theirs = socket.socketpair()
            theirs.close()
            self.made.append(ours)
            return ours

    source = Slow()
    with anyio.fail_after(5), anyio.move_on_after(0.1):
        _ = await open_link(source, after_death=False, client="test")
    assert source.wanted == 0
    source.go.set()
    await until(lambda: source.made and source.made[0].fileno() == -1)


async def test_a_credential_goes_into_the_greeting() -> None:
    engine = Engine(done)
    link = await SocketLink.connect(engine.client, "test", credential="open sesame")
    link.close()
    engine.close()
    assert isinstance(engine.commands[0], wire.Hello) and engine.commands[0].credential == "open sesame"


async def test_an_engine_that_speaks_garbage_from_the_first_is_told_apart_from_one_that_is_gone() -> None:
    client, peer = socket.socketpair()
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with anyio.fail_after(10), pytest.raises(errors.EngineDied, match="no frame of the protocol"):
        _ = await SocketLink.connect(client, "test")
    peer.close()
