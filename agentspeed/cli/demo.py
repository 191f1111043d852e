"""What `agentspeed demo` shows: a wrong answer taken back, forks, an adoption, and a table of what each cost."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table

from agentspeed import Reply, Session, Usage

_TARGET: Final = 30
_PUZZLE: Final = f"Reach {_TARGET} from 3 3 5."
"""The shipped model's likeliest answer is wrong and others of its answers are right: a reason to branch."""
_MOST_TOKENS: Final = 96
_NUMBERS: Final = ("resumed", "new", "shared", "recomputed", "drawn", "computed")
"""Of `Usage`, by their names there."""


async def demonstrate(model: str | None) -> None:
    """Prints as it goes; ends with the table."""
    console = Console(width=min(100, Console().width), highlight=False, markup=False, emoji=False)
    costs: list[tuple[str, Usage]] = []

    def tell(what: str, said: str) -> None:
        console.print(f"{what:<12}{said}")

    console.print("Starting an engine process ...")
    async with Session(model, seed=1) as s:
        start = await s.mark("start")
        tell("a turn", f"> {_PUZZLE}")
        reply = await s.generate(_PUZZLE, max_tokens=_MOST_TOKENS)
        tell("", _judged(reply))
        costs.append(("a turn", reply.usage))
        await s.rewind(start)
        tell("rewind", f"to the start: {s.tokens} tokens, {len(s.messages)} messages")
        tell("four forks", f"> {_PUZZLE}")
        async with s.fork(4) as branches:
            replies = [
                await branch.generate(_PUZZLE, max_tokens=_MOST_TOKENS, temperature=1.0, seed=7 + number)
                for number, branch in enumerate(branches)
            ]
            for number, reply in enumerate(replies, 1):
                tell(f"  branch {number}", _judged(reply))
            costs.append(("four forks, a turn each", sum((reply.usage for reply in replies), Usage())))
            best = max(range(4), key=lambda number: _reaches(replies[number]))
            await s.adopt(branches[best])
        tell("adopt", f"branch {best + 1} is the session now: {s.tokens} tokens, {len(s.messages)} messages")
        line = "Thank you!"
        tell("a turn", f"> {line}")
        reply = await s.generate(line, max_tokens=_MOST_TOKENS)
        tell("", _shown(reply))
        costs.append(("a turn after the adoption", reply.usage))
    table = Table("tokens", *_NUMBERS)
    for what, usage in costs:
        table.add_row(what, *(str(getattr(usage, name)) for name in _NUMBERS))
    console.print(table)
    console.print("What a session has computed is resumed, forked and gone back to; it is not computed again.")


def _reaches(reply: Reply[str]) -> bool:
    return reply.text.rstrip(" .").endswith(f"={_TARGET}")


def _judged(reply: Reply[str]) -> str:
    return f"{_shown(reply)}  ({'reaches' if _reaches(reply) else 'does not reach'} {_TARGET})"


def _shown(reply: Reply[str]) -> str:
    """On one line; it says where the answer did not end by itself."""
    return " ".join(reply.text.split()) + (" ... (cut)" if reply.finish_reason == "max_tokens" else "")
