"""A session in one minute: generate, fork, adopt, rewind, and a table of what was computed, reused and forked.

Run: `python examples/agents/quickstart.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import anyio

from agentspeed import Session, Usage
from agentspeed.engine import NANO


@dataclass(frozen=True)
class Line:
    """One row of the closing table."""

    what: str
    usage: Usage
    pages_copied: int


def model_folder() -> Path:
    """The folder named on the command line, else the shipped model, else a small random one made now."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    if (NANO / "model.safetensors").is_file():
        return NANO
    root = Path(__file__).resolve().parents[2]
    folder = root / ".checkpoints" / "quickstart"
    if not (folder / "model.safetensors").is_file():
        print("Writing a small random model (its words mean nothing; its KV is real) ...", flush=True)
        sys.path.insert(0, str(root / "tools"))
        import json

        from random_checkpoint import make_checkpoint

        config = json.loads((root / "bench" / "models" / "tiny.json").read_text())
        _ = make_checkpoint(config, folder)
    return folder


async def main() -> None:
    folder = model_folder()
    lines: list[Line] = []
    print(f"Starting an engine process for {folder.name} ...", flush=True)
    started = time.perf_counter()
    async with Session(folder, system="You are a brief and friendly assistant.") as s:
        print(f"  ready after {time.perf_counter() - started:.1f} s: {s!r}", flush=True)

        async def copied() -> int:
            return (await s.engine.stats()).counts["pages_copied"]

        async def note(what: str, usage: Usage, before: int) -> None:
            lines.append(Line(what, usage, await copied() - before))

        before = await copied()
        print("\nFirst turn, streamed: ", end="", flush=True)
        async with s.stream("Hello! Who are you?", max_tokens=48) as turn:
            async for event in turn:
                if type(event).__name__ == "TextDelta":
                    print(event.text, end="", flush=True)
        print()
        await note("first turn", turn.usage, before)
        mark = await s.mark("introduced")

        before = await copied()
        reply = await s.generate("What can you do?", max_tokens=48)
        print(f"Second turn: {reply.text}")
        await note("second turn: the first is resumed", reply.usage, before)

        before = await copied()
        async with s.fork(4) as branches:
            total = Usage()
            replies = []
            for branch in branches:
                replies.append(await branch.generate("Thanks!", max_tokens=16, temperature=1.0))
                total = total + replies[-1].usage
            print(f"Four branches from there: {[answer.text for answer in replies]}")
            await note("4 forks, one turn each", total, before)
            best = max(range(4), key=lambda index: len(replies[index].text))
            await s.adopt(branches[best])
            print(f"Adopted branch {best}: {s!r}")

        await s.rewind(mark)
        print(f"Rewound to {mark}: {s!r}")
        before = await copied()
        reply = await s.generate("Goodbye.", max_tokens=16)
        await note("a turn after rewinding", reply.usage, before)

    print(f"\n{'':36}{'computed':>10}{'resumed':>10}{'recomputed':>12}{'drawn':>8}{'pages copied':>14}")
    for line in lines:
        usage = line.usage
        print(f"{line.what:36}{usage.new - usage.shared:>10}{usage.resumed:>10}{usage.recomputed:>12}"
              f"{usage.drawn:>8}{line.pages_copied:>14}")
    print("\nA fork copies at most the one page it goes on writing; what was computed once is never computed again.")


if __name__ == "__main__":
    anyio.run(main)
