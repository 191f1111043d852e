"""A research agent: questions are looked into by parallel forks, and a context that fills up is compacted on the way.

Each fork has the whole conversation without computing it again, reads as much as it wants, and leaves one line of notes
behind; what it read ends with it. Between rounds `compact` lets the same session go on over a summary. Without a model
folder a script speaks for the model: the shipped one cannot do research.

Run: `python examples/agents/research_agent.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import textwrap

import anyio

from agentspeed import Engine, Limits, Session, User, tool
from agentspeed.testing import ScriptedEngine, Turn, tool_call

LIBRARY = {
    "tea": "Tea is the most drunk prepared drink. It is made of the leaves of Camellia sinensis.",
    "coffee": "Coffee is made of roasted seeds. Finland drinks the most of it, by head.",
    "cocoa": "Cocoa comes from West Africa for the most part: Ivory Coast grows two of five beans.",
    "mate": "Mate is drunk from a gourd. Its leaves grow in Paraguay, Brazil and Argentina.",
}
ROUNDS = (("tea", "coffee"), ("cocoa", "mate"))
TASK = "We write an article on what people drink, where it grows and how it is made. Keep notes short, one line each."


@tool
async def search(query: str) -> str:
    """Look something up in the library."""
    await anyio.sleep(0.05)
    return next((text for name, text in LIBRARY.items() if name in query.lower()), "nothing was found") * 3


async def look_into(branch: Session, topic: str, notes: dict[str, str]) -> None:
    """In a fork: what it reads stays there."""
    result = await branch.run(f"Look into {topic}.", max_turns=3, limits=Limits(tokens=400, seconds=60))
    notes[topic] = result.text
    spent = f"{result.usage.resumed:4} tokens resumed, {result.usage.computed:3} computed"
    print(f"  {topic:7} {spent}: {textwrap.shorten(result.text, 40)}")


async def sum_up(branch: Session) -> str:
    reply = await branch.generate("Sum up the notes so far in one line.", max_tokens=80)
    return f"The notes so far: {reply.text}"


async def research(s: Session) -> str:
    _ = await s.add(User(TASK), prefill=True)
    for topics in ROUNDS:
        print(f"a round on {' and '.join(topics)}, from {s.tokens} tokens")
        notes: dict[str, str] = {}
        async with s.fork(len(topics)) as branches, anyio.create_task_group() as group:
            for branch, topic in zip(branches, topics, strict=True):
                _ = group.start_soon(look_into, branch, topic, notes)
        _ = await s.add(*(f"Note on {topic}: {notes[topic]}" for topic in topics))
        if s.room < 0.7 * s.context_limit:
            done = await s.compact(keep=0, summary=sum_up)
            print(f"compacted: {done.dropped} messages in {done.tokens_before} tokens are {done.tokens} now")
    reply = await s.generate("Write the article.", max_tokens=120)
    print(f"the article: {reply.text}\n{s.usage.computed} tokens computed by the session itself")
    return reply.text


def script(turn: Turn) -> str:
    asked = turn.log.rpartition("<|user|>")[2]
    if "Look into" in asked:
        topic = asked.partition("Look into ")[2].partition(".")[0]
        return LIBRARY[topic].partition(".")[0] + "." if "<|tool|>" in asked else tool_call("search", query=topic)
    if "Sum up" in asked:
        return "tea is of leaves, coffee of seeds."
    return "People drink leaves, seeds and beans."


async def main(model: str | None = None) -> str:
    if model is None:
        async with ScriptedEngine(script, context_limit=512) as scripted:
            return await on(scripted.engine)
    async with Engine(model) as engine:
        return await on(engine)


async def on(engine: Engine) -> str:
    async with engine.session(system="You write for a magazine.", tools=[search]) as s:
        return await research(s)


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
