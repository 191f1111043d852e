"""An agent in one minute: it calls a tool, pauses, resumes, fails at a puzzle, goes back, branches, keeps the winner.

Run: `python examples/agents/quickstart.py [MODEL FOLDER]`
"""

from __future__ import annotations

import re
import sys
import textwrap
import time

import anyio

from agentspeed import Engine, Usage, events, tool
from agentspeed.search import best_of_n

NUMBERS, TARGET = (3, 3, 5), 30
PUZZLE = f"Reach {TARGET} from {' '.join(map(str, NUMBERS))}."
LINES: list[tuple[str, Usage]] = []


@tool
async def get_weather(city: str) -> dict[str, str | int]:
    """Get the weather for a city."""
    await anyio.sleep(0.3)
    return {"sky": "clear", "temp": 21 if city == "Oslo" else 28}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def show(event: events.AnyEvent) -> None:
    """What the agent does between question and answer."""
    match event:
        case events.ToolCallReady(call=call):
            print(f"    calls {call.name}({short(call.arguments)})")
        case events.Paused(lease=lease):
            print(f"    pauses; {lease.residence.device} tokens are kept under a {lease.keep} lease")
        case events.ToolFinished(call=call, content=content, seconds=seconds):
            print(f"    {call.name} took {seconds:.2f} s: {short(content)}")
        case events.Resumed(device=device, recomputed=recomputed):
            print(f"    resumes with {device} tokens, {recomputed} recomputed")
        case _:
            return


def short(text: str) -> str:
    """One line of at most 60 characters."""
    return textwrap.shorten(text, 60, placeholder=" ...") or "(nothing)"


async def tools(engine: Engine) -> None:
    """A tool loop: the model calls, the session pauses while the tool runs and goes on with what it had."""
    async with engine.session(tools=[get_weather, add]) as s:
        for ask in ("What is the weather in Oslo?", "What is 17 plus 25?"):
            print(f"\n> {ask}")
            result = await s.run(ask, max_tokens=96, max_turns=3, on_event=show)
            print(f"< {short(result.text)}")
            LINES.append((ask, result.usage))


def solves(text: str) -> bool:
    """Whether every step is right, uses numbers that are left and uses them up, and the last one gives the target."""
    left = list(NUMBERS)
    for step in text.strip().split(","):
        found = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step)
        if found is None:
            return False
        one, two, value = int(found[1]), int(found[3]), int(found[4])
        right = {"+": one + two, "-": one - two, "*": one * two}[found[2]] == value
        for used in (one, two):
            if not right or used not in left:
                return False
            left.remove(used)
        left.append(value)
    return left == [TARGET]


async def branches(engine: Engine) -> None:
    """One puzzle: the likeliest answer, and after its failure eight forks from the same place. The first that solves it
    becomes the session, the others are closed at once."""
    async with engine.session(seed=3) as s:
        mark = await s.mark("before the puzzle")
        print(f"\n> {PUZZLE}")
        reply = await s.generate(PUZZLE, max_tokens=48)
        LINES.append((f"{PUZZLE} (one greedy try)", reply.usage))
        if solves(reply.text):
            print(f"< {short(reply.text)}  (one greedy try, right)")
            return
        print(f"< {short(reply.text)}  (one greedy try, wrong)")
        await s.rewind(mark)
        print(f"    rewinds to '{mark.name}': {s.tokens} tokens, no trace of the failure")
        before = s.usage
        found = await best_of_n(
            s, PUZZLE, n=8, score=lambda node: float(solves(node.whole)), solved_at=1.0, max_tokens=48
        )
        judged = "right" if solves(found.text) else "wrong"
        print(f"< {short(found.text)}  (best of {found.cost.branches} branches, {judged})")
        cost = found.cost
        print(
            f"    {cost.tokens} tokens computed by all branches; without fork {cost.tokens_without_fork}, "
            f"{cost.ratio:.1f} times as many"
        )
        LINES.append((f"{PUZZLE} (the winner)", s.usage - before))


async def main(model: str | Engine | None = None) -> list[tuple[str, Usage]]:
    """Returns what each step cost."""
    LINES.clear()
    started = time.perf_counter()
    async with model if isinstance(model, Engine) else Engine(model) as engine:
        print(f"Engine ready after {time.perf_counter() - started:.1f} s.")
        await tools(engine)
        await branches(engine)
    print(f"\n{'tokens':38}{'resumed':>9}{'new':>6}{'shared':>8}{'recomputed':>12}{'drawn':>7}{'computed':>10}")
    for what, usage in LINES:
        print(
            f"{what:38}{usage.resumed:>9}{usage.new:>6}{usage.shared:>8}{usage.recomputed:>12}{usage.drawn:>7}"
            f"{usage.computed:>10}"
        )
    print("What was computed once is resumed, forked or rewound to; it is not computed again.")
    return LINES


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
