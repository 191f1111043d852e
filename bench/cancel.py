"""Ten thousand cancellations and client deaths and fifty engine kills: what leaks, what is lost, how soon all goes on.

    python bench/cancel.py [--events 10000] [--kills 50] [--seed 1]

A real engine process with a real (small, random, float64) model serves chats over several links. Every chat has a
reference: what it draws when nobody disturbs it. Its turns are cancelled at random moments (some with a cut), forked
while they run, their links are dropped, and their engine is killed with SIGKILL; after each the chat goes on from the
ids its front mirrors, with the same seed. `lost_tokens` counts positions at which a chat differs from its reference,
and tokens by which front and engine disagree. `leaked_pages` are pages that belong to nobody after all branches closed,
and all pages of a turn that then does not get the whole pool; `leaked_processes` are engines that outlive their end.
`usable_again_ms_p99` is the time from a cancellation or a dropped link to the same chat's next token. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

from agentspeed_engine.protocol.messages import Sampling
from tests.support.engine_client import EngineProcess, Front, LinkClosed, TurnRecord, alive, engine, until
from tests.support.random_checkpoint import make_checkpoint

PAGES, PAGE_TOKENS, HOST_SLOTS = 90, 16, 200
"""Too few pages for all chats at once, so that turns are preempted and sessions moved to host memory meanwhile."""
CONTEXT = (PAGES - 1) * PAGE_TOKENS
CHAT_TOKENS = 160
"""Tokens a chat draws before it begins anew."""
SAMPLING = Sampling(temperature=1.0, top_p=0.95)


@dataclass
class Chat:
    """One session as its front knows it."""

    prompt: list[int]
    seed: int
    reference: list[int] = field(default_factory=list)
    """The prompt and all it draws undisturbed."""
    ids: list[int] = field(default_factory=list)
    branch: int | None = None
    turn: TurnRecord | None = None

    def mirror(self) -> int:
        """Takes over what the running turn drew; returns how many positions differ from the reference."""
        if self.turn is not None:
            self.ids = self.ids + self.turn.ids
            self.turn = None
        return sum(ours != theirs for ours, theirs in zip(self.ids, self.reference, strict=False))


@dataclass
class Tally:
    """What the last line reports."""

    events: dict[str, int] = field(default_factory=lambda: {"cancel": 0, "cut": 0, "death": 0, "live_fork": 0})
    lost_tokens: int = 0
    leaked_pages: int = 0
    usable_ms: list[float] = field(default_factory=list)
    usable_after_kill_ms: list[float] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    @property
    def disturbances(self) -> int:
        return self.events["cancel"] + self.events["cut"] + self.events["death"]


def main() -> None:
    options = parse_arguments()
    draw = random.Random(options.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["AGENTSPEED_STATE_DIR"] = scratch  # what the kills leave is nobody's crash
        checkpoint = make_checkpoint(json.loads(options.config.read_text()), folder / "model", dtype="float64")
        settings = {
            "model": str(checkpoint),
            "dtype": "float64",
            "pages": PAGES,
            "page_tokens": PAGE_TOKENS,
            "context_limit": CONTEXT,
            "host_slots": HOST_SLOTS,
            "threads": 1,
            "firm_pages": 0,
        }
        chats = [
            Chat([draw.randrange(512) for _ in range(draw.randrange(20, 90))], seed=number)
            for number in range(options.chats)
        ]
        tally = Tally()
        with engine(folder, **settings) as process:
            tally.pids.append(process.pid)
            draw_references(process.connect(), chats)
            Disturbance(process, chats, tally, draw, options.links).run(options.events)
            tally.leaked_pages += leaked_pages(process.connect())
        kill_engines(folder, settings, chats, tally, draw, options.kills)
    until("all engines are gone", lambda: not any(map(alive, tally.pids)), seconds=10)
    report(tally, time.perf_counter() - started)


def draw_references(front: Front, chats: list[Chat]) -> None:
    """Each chat alone, undisturbed, in one turn."""
    for chat in chats:
        branch = front.open(private=True)
        turn = front.generate(branch, chat.prompt, max_tokens=CHAT_TOKENS, sampling=SAMPLING, seed=chat.seed)
        chat.reference = chat.prompt + turn.ids
        chat.ids = list(chat.prompt)
        front.end(branch)
    front.close()


class Disturbance:
    """Runs chats over several links of one engine and disturbs them."""

    def __init__(
        self, process: EngineProcess, chats: list[Chat], tally: Tally, draw: random.Random, links: int
    ) -> None:
        self._process, self._tally, self._draw = process, tally, draw
        self._fronts = [process.connect() for _ in range(links)]
        self._chats = [chats[number::links] for number in range(links)]

    def run(self, events: int) -> None:
        said = 0
        while self._tally.disturbances < events:
            number = self._draw.randrange(len(self._fronts))
            chat = self._draw.choice(self._chats[number])
            pump(self._fronts[number])
            if chat.turn is None or chat.turn.ended is not None:
                self._go_on(number, chat)
            else:
                time.sleep(self._draw.random() * 0.002)  # somewhere within a step
                self._disturb(number, chat)
            if self._tally.disturbances >= said + 1000:
                said = self._tally.disturbances
                print(f"{said} disturbances, {self._tally.lost_tokens} tokens lost")
        for front in self._fronts:
            front.close()

    def _go_on(self, number: int, chat: Chat) -> None:
        """The next turn of a chat; one that reached its end begins anew."""
        front, tally = self._fronts[number], self._tally
        tally.lost_tokens += chat.mirror()
        if len(chat.ids) >= len(chat.reference):
            if chat.branch is not None:
                front.end(chat.branch)
            chat.branch, chat.ids = None, list(chat.prompt)
        self._begin(number, chat, min(len(chat.reference) - len(chat.ids), self._draw.randrange(1, 60)))

    def _begin(self, number: int, chat: Chat, tokens: int) -> None:
        front = self._fronts[number]
        if chat.branch is None:
            chat.branch = front.open(chat.ids)
        chat.turn = front.start(chat.branch, max_tokens=tokens, sampling=SAMPLING, seed=chat.seed)

    def _disturb(self, number: int, chat: Chat) -> None:
        kind = self._draw.choices(["cancel", "cut", "death", "live_fork"], [80, 8, 6, 6])[0]
        self._tally.events[kind] += 1
        started = time.perf_counter()
        if kind == "death":
            self._die(number)
        elif kind == "live_fork":
            self._fork(number, chat)
            return
        else:
            self._cancel(number, chat, cut=len(chat.ids) if kind == "cut" else None)
        if len(chat.ids) < len(chat.reference) and self._draw.random() < 0.2:
            self._begin(number, chat, tokens=len(chat.reference) - len(chat.ids))
            turn = chat.turn
            assert turn is not None
            while not turn.ids:
                self._fronts[number].step()
            self._tally.usable_ms.append((time.perf_counter() - started) * 1e3)

    def _cancel(self, number: int, chat: Chat, cut: int | None) -> None:
        assert chat.branch is not None and chat.turn is not None
        known = self._fronts[number].cancel(chat.branch, cut)
        assert chat.turn.ended is not None
        if cut is not None:
            chat.turn = None
        self._tally.lost_tokens += chat.mirror() + abs(known - len(chat.ids))

    def _die(self, number: int) -> None:
        """The link breaks with all its turns; the front goes on with what it has read."""
        self._fronts[number].close()
        for chat in self._chats[number]:
            self._tally.lost_tokens += chat.mirror()
            chat.branch = None
        self._fronts[number] = self._process.connect()

    def _fork(self, number: int, chat: Chat) -> None:
        """A child of the running turn draws what the turn itself would draw."""
        front = self._fronts[number]
        assert chat.branch is not None and chat.turn is not None
        turn = chat.turn
        (child,) = front.fork(chat.branch)
        known = front.inspect(child).known
        so_far = (chat.ids + turn.ids)[:known]
        wanted = min(2, len(chat.reference) - known)
        if wanted > 0:
            so_far += front.generate(child, max_tokens=wanted, sampling=SAMPLING, seed=chat.seed).ids
        self._tally.lost_tokens += sum(ours != theirs for ours, theirs in zip(so_far, chat.reference, strict=False))
        self._tally.lost_tokens += known + max(0, wanted) - len(so_far)
        front.end(child)


def pump(front: Front) -> None:
    """Reads what has come, without waiting for more."""
    while select.select([front.socket], [], [], 0)[0]:
        front.step()


def leaked_pages(front: Front) -> int:
    """After everyone left: pages of nobody, and whether one turn can still have the whole pool."""
    until(
        "every branch is closed and no copy in flight",
        lambda: front.counts()["branches"] == 0 and front.counts()["tickets"] == 0,
    )
    counts = front.counts()
    moved = ("preemptions", "pages_evicted", "pages_saved", "pages_loaded")
    print(", ".join(f"{name} {counts[name]}" for name in moved))
    leaked = counts["pages_total"] - counts["pages_free"] - counts["pages_nodes"] + counts["pages_tail"]
    branch = front.open(private=True)
    turn = front.generate(branch, [7] * (CONTEXT - 1), max_tokens=1)
    front.end(branch)
    return leaked + (0 if len(turn.ids) == 1 else counts["pages_total"])


def kill_engines(
    folder: Path, settings: dict[str, object], chats: list[Chat], tally: Tally, draw: random.Random, kills: int
) -> None:
    """SIGKILL in the middle of turns; a new engine goes on from what the front had read."""
    killed_at: float | None = None
    for number in range(kills + 1):
        process = EngineProcess(folder, **settings)
        tally.pids.append(process.pid)
        front = process.connect()
        for chat in chats:
            if len(chat.ids) >= len(chat.reference):
                chat.ids = list(chat.prompt)
            chat.branch = front.open(chat.ids)
            chat.turn = front.start(
                chat.branch, max_tokens=len(chat.reference) - len(chat.ids), sampling=SAMPLING, seed=chat.seed
            )
            if killed_at is not None:
                while not chat.turn.ids:
                    front.step()
                tally.usable_after_kill_ms.append((time.perf_counter() - killed_at) * 1e3)
                killed_at = None
        if number == kills:
            front.finish(*(chat.turn for chat in chats if chat.turn is not None))
            front.close()
            process.close()
        else:
            deadline = time.perf_counter() + draw.random() * 0.15
            while time.perf_counter() < deadline:
                pump(front)
            killed_at = time.perf_counter()
            process.kill()
            read_to_the_end(front)
        for chat in chats:
            tally.lost_tokens += chat.mirror()
        process.path.unlink(missing_ok=True)
        if number % 10 == 9:
            print(f"{number + 1} engines killed, {tally.lost_tokens} tokens lost")
    tally.lost_tokens += sum(len(chat.reference) - len(chat.ids) for chat in chats)


def read_to_the_end(front: Front) -> None:
    """What a dead engine had sent is still in the socket; a frame cut off by the kill is not a frame."""
    try:
        while True:
            front.step()
    except LinkClosed:
        front.close()


def report(tally: Tally, seconds: float) -> None:
    kills = len(tally.usable_after_kill_ms)
    figures = {
        "leaked_pages": tally.leaked_pages,
        "leaked_processes": sum(map(alive, tally.pids)),
        "lost_tokens": tally.lost_tokens,
        "usable_again_ms_p99": percentile(tally.usable_ms),
        "usable_again_ms_p50": round(statistics.median(tally.usable_ms), 1),
        "usable_after_kill_ms_p99": percentile(tally.usable_after_kill_ms),
        "disturbances": tally.disturbances,
        **tally.events,
        "kills": kills,
        "seconds": round(seconds, 1),
    }
    print(
        f"leaked_pages {figures['leaked_pages']}, leaked_processes {figures['leaked_processes']}, "
        f"lost_tokens {figures['lost_tokens']} (all must be 0)"
    )
    print(json.dumps(figures))


def percentile(samples: list[float]) -> float | None:
    return round(statistics.quantiles(samples, n=100)[98], 1) if len(samples) > 1 else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/tiny.json")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--links", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
