"""A blocking front for tests and benchmarks: an engine in a process or a thread, and links that speak its frames."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import encode_command, outbox_reader
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.serve.tuning import tuned

ROOT = Path(__file__).resolve().parents[2]
GREEDY = wire.Sampling()
_Reply = TypeVar("_Reply", bound=wire.Message)


class LinkClosed(Exception):
    """The engine ended the link; `last` is what it said before."""

    def __init__(self, last: wire.Outgoing | None = None) -> None:
        super().__init__(f"the engine closed the link after {last!r}")
        self.last = last


class Refused(Exception):
    """A command was answered by `Failed`."""

    def __init__(self, failed: wire.Failed) -> None:
        super().__init__(f"{failed.code}: {failed.message} {failed.remedy}")
        self.failed = failed
        self.code = failed.code


@dataclass
class TurnRecord:
    """Everything a turn said."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[wire.TopLogprob, ...]] = field(default_factory=list)
    draw_logprobs: list[float] = field(default_factory=list)
    started: wire.TurnStarted | None = None
    ended: wire.TurnEnded | None = None
    frames: int = 0


class Front:
    """One link. Commands wait for their reply; turns of many branches may run meanwhile."""

    def __init__(self, link: socket.socket, *, greet: bool = True) -> None:
        self.socket = link
        self.socket.settimeout(30.0)
        self._reader = outbox_reader()
        self._request = 0
        self._replies: dict[int, wire.Outgoing] = {}
        self.turns: defaultdict[int, deque[TurnRecord]] = defaultdict(deque)
        self.lease_changes: list[wire.LeaseChanged] = []
        self.last: wire.Outgoing | None = None
        if greet:
            self.welcome = self.ask(wire.Hello(request=self.number()), wire.Welcome)

    def number(self) -> int:
        self._request += 1
        return self._request

    # ---- frames ---------------------------------------------------------------------------------------------------
    def send(self, *commands: wire.Command) -> None:
        try:
            self.socket.sendall(b"".join(map(encode_command, commands)))
        except ConnectionError as error:
            raise LinkClosed(self.last) from error

    def receive(self) -> tuple[wire.Outgoing, ...]:
        """The next frame. Raises `LinkClosed`."""
        while (frame := self._reader.next()) is None:
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionError as error:
                raise LinkClosed(self.last) from error
            if not data:
                raise LinkClosed(self.last)
            self._reader.feed(data)
        return frame

    def step(self) -> None:
        """Takes one frame and files its messages."""
        for message in self.receive():
            self.last = message
            match message:
                case wire.TurnStarted():
                    self.turns[message.branch][-1].started = message
                case wire.Tokens():
                    turn = self.turns[message.branch][-1]
                    turn.ids += unpack_ids(message.ids)
                    turn.logprobs += message.logprobs
                    turn.draw_logprobs += message.draw_logprobs
                    turn.top += message.top
                    turn.frames += 1
                case wire.TurnEnded():
                    self.turns[message.branch][-1].ended = message
                case wire.LeaseChanged():
                    self.lease_changes.append(message)
                case _:
                    self._replies[message.request] = message

    def ask(self, command: wire.Command, reply: type[_Reply]) -> _Reply:
        """Sends, and waits for the reply. Raises `Refused`."""
        self.send(command)
        return self.answer(command.request, reply)

    def answer(self, request: int, reply: type[_Reply]) -> _Reply:
        while request not in self._replies:
            self.step()
        answer = self._replies.pop(request)
        if isinstance(answer, wire.Failed):
            raise Refused(answer)
        assert isinstance(answer, reply), answer
        return answer

    # ---- verbs ----------------------------------------------------------------------------------------------------
    def open(self, ids: Sequence[int] = (), **options: Any) -> int:
        return self.ask(wire.Open(request=self.number(), ids=pack_ids(tuple(ids)), **options), wire.Opened).branch

    def start(self, branch: int, ids: Sequence[int] = (), **options: Any) -> TurnRecord:
        """Begins a turn and returns its record, which later frames fill."""
        record = TurnRecord()
        self.turns[branch].append(record)
        command = wire.Generate(request=self.number(), branch=branch, ids=pack_ids(tuple(ids)), **options)
        try:
            self.ask(command, wire.Done)
        except Refused:
            self.turns[branch].remove(record)
            raise
        return record

    def finish(self, *records: TurnRecord) -> None:
        for record in records:
            while record.ended is None:
                self.step()

    def generate(self, branch: int, ids: Sequence[int] = (), **options: Any) -> TurnRecord:
        record = self.start(branch, ids, **options)
        self.finish(record)
        return record

    def fork(self, branch: int, n: int = 1, at: int | None = None) -> tuple[int, ...]:
        return self.ask(wire.Fork(request=self.number(), branch=branch, n=n, at=at), wire.Forked).branches

    def rewind(self, branch: int, tokens: int) -> int:
        return self.ask(wire.Rewind(request=self.number(), branch=branch, tokens=tokens), wire.Done).known

    def adopt(self, branch: int, child: int) -> int:
        return self.ask(wire.Adopt(request=self.number(), branch=branch, child=child), wire.Done).known

    def cancel(self, branch: int, cut: int | None = None) -> int:
        return self.ask(wire.Cancel(request=self.number(), branch=branch, cut=cut), wire.Done).known

    def end(self, branch: int) -> int:
        return self.ask(wire.Close(request=self.number(), branch=branch), wire.Done).known

    def inspect(self, branch: int) -> wire.Inspected:
        return self.ask(wire.Inspect(request=self.number(), branch=branch), wire.Inspected)

    def stats(self) -> wire.Stats:
        return self.ask(wire.GetStats(request=self.number()), wire.Stats)

    def counts(self) -> dict[str, int]:
        return self.stats().counts

    def close(self) -> None:
        self.socket.close()


class EngineProcess:
    """An engine started as users' fronts start it; its stdin is the pipe that holds it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = folder / "engine.sock"
        command = [
            sys.executable,
            "-m",
            "agentspeed_engine.serve",
            "--socket",
            str(self.path),
            "--options",
            json.dumps(options),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        self.progress: list[str] = []
        self.links: list[socket.socket] = []
        self.errors = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self.pid = int(said["pid"])
                return
            if "progress" in said:
                self.progress.append(said["progress"])
        self.wait()
        raise RuntimeError(f"the engine did not start: {self.errors}")

    def connect(self, *, greet: bool = True) -> Front:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.links.append(link)
        link.connect(str(self.path))
        return Front(link, greet=greet)

    def wait(self, seconds: float = 20.0) -> int:
        """The exit status; what it wrote to stderr is in `errors`."""
        status = self.process.wait(seconds)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is self.process.stderr and pipe is not None and not pipe.closed:
                self.errors = pipe.read().decode()
            if pipe is not None:
                pipe.close()
        return status

    def disconnect(self) -> None:
        """Closes every link made here."""
        for link in self.links:
            link.close()
        self.links.clear()

    def kill(self) -> int:
        self.process.kill()
        return self.wait()

    def close(self) -> int:
        """Ends it the polite way: end of file on its stdin."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        return self.wait()


def environment() -> dict[str, str]:
    """Of an engine process that runs from this checkout, with what else this one was told to import from; tuned
    already, or each would start twice."""
    paths = [*map(str, (ROOT, ROOT / "engine", ROOT / "kernels")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return tuned(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[EngineProcess]:
    """An engine process that is gone afterwards, whatever happened."""
    process = EngineProcess(folder, **options)
    try:
        yield process
    finally:
        if process.process.returncode is None:
            process.close()
        process.disconnect()


def until(what: str, true: Any, seconds: float = 10.0) -> None:
    """Waits for a condition that another process brings about."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not after {seconds} s: {what}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """False for a zombie as well: whoever inherits orphans may be slow to reap them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
