"""An agent in one minute: it calls a tool, pauses, resumes, goes back, branches on a puzzle and keeps the winner.

Run: `python examples/agents/quickstart.py [MODEL FOLDER]`
"""

from __future__ import annotations

import re
import sys
import textwrap
import time

import anyio

from agentspeed import Engine, Usage, events, tool
from agentspeed.search import Node, best_of_n

NUMBERS, TARGET = (2, 5, 4), 14
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
    """A tool loop, then the same session taken back to before its second question."""
    async with engine.session(tools=[get_weather, add]) as s:
        for index, ask in enumerate(("What is the weather in Oslo?", "What is 17 plus 25?")):
            print(f"\n> {ask}")
            if index == 1:
                mark = await s.mark("after the weather")
            result = await s.run(ask, max_tokens=96, max_turns=3, on_event=show)
            print(f"< {short(result.text)}")
            LINES.append((ask, result.usage))
        await s.rewind(mark)
        ask = "What is the weather in Lima?"
        print(f"\nTaken back to '{mark.name}' ({mark.tokens} tokens).\n> {ask}")
        result = await s.run(ask, max_tokens=96, max_turns=3, on_event=show)
        print(f"< {short(result.text)}")
        LINES.append((f"{ask} (after rewinding)", result.usage))


def solves(node: Node) -> float:
    """1 when every step is right, uses numbers that are left and uses them up, and the last one gives the target."""
    left = list(NUMBERS)
    for step in node.whole.strip().split(","):
        found = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step)
        if found is None:
            return 0.0
        one, two, value = int(found[1]), int(found[3]), int(found[4])
        right = {"+": one + two, "-": one - two, "*": one * two}[found[2]] == value
        for used in (one, two):
            if not right or used not in left:
                return 0.0
            left.remove(used)
        left.append(value)
    return float(left == [TARGET])


async def branches(engine: Engine) -> None:
    """One puzzle, eight forks; the first that solves it becomes the session, the others are closed at once."""
    async with engine.session(seed=3) as s:
        print(f"\n> {PUZZLE}")
        greedy = await s.generate(PUZZLE, max_tokens=48)
        print(f"< {short(greedy.text)}  (one greedy try)")
    async with engine.session(seed=3) as s:
        found = await best_of_n(s, PUZZLE, n=8, score=solves, solved_at=1.0, max_tokens=48)
        print(f"< {short(found.text)}  (best of {found.cost.branches} branches, {found.ended})")
        print(f"  {found.cost.tokens} tokens computed; {found.cost.tokens_without_fork} without fork, "
              f"{found.cost.ratio:.1f} times as many")
        LINES.append((f"{PUZZLE} (the winner)", s.usage))


async def main(model: str | Engine | None = None) -> list[tuple[str, Usage]]:
    """Returns what each step cost."""
    LINES.clear()
    started = time.perf_counter()
    async with (model if isinstance(model, Engine) else Engine(model)) as engine:
        print(f"Engine ready after {time.perf_counter() - started:.1f} s.")
        await tools(engine)
        await branches(engine)
    print(f"\n{'':48}{'computed':>10}{'resumed':>9}{'recomputed':>12}{'drawn':>7}")
    for what, usage in LINES:
        print(f"{what:48}{usage.new - usage.shared:>10}{usage.resumed:>9}{usage.recomputed:>12}{usage.drawn:>7}")
    print("What was computed once is resumed, forked or rewound to; it is not computed again.")
    return LINES


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
