"""A failed attempt is taken back: rewind to a mark, try again, and nothing of the failure stays in the context.

Run: `python examples/agents/rewind.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import textwrap

import anyio

from agentspeed import Engine, Session
from agentspeed.messages import User

NUMBERS, TARGET = (3, 5, 7), 36
ASK = f"Reach {TARGET} from {' '.join(map(str, NUMBERS))}."
TRIES = 12


def reaches(text: str) -> bool:
    """Whether the last step ends at the target; a stand-in for tests that pass or fail."""
    return text.strip().endswith(f"={TARGET}")


async def main(model: str | Engine | None = None) -> int:
    """Returns how many attempts it took, or 0 when none succeeded."""
    async with Session(model, seed=2) as s:
        _ = await s.add(User(ASK), prefill=True)
        mark = await s.mark("asked")
        print(f"> {ASK}  ({mark.tokens} tokens computed once)")
        for attempt in range(1, TRIES + 1):
            reply = await s.generate(max_tokens=64, temperature=1.0)
            shown = textwrap.shorten(reply.text, 40, placeholder="...")
            if reaches(reply.text):
                print(f"  attempt {attempt}: {shown}  ok")
                print(f"< kept; the context has {len(s.messages)} messages and no trace of the {attempt - 1} failures")
                return attempt
            print(f"  attempt {attempt}: {shown}  failed, taken back ({reply.usage.resumed} tokens resumed)")
            await s.rewind(mark)
            assert s.tokens == mark.tokens
        print("< none of the attempts succeeded")
        return 0


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
