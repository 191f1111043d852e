"""What `agentspeed demo` shows: forks and rewinds on a real engine, and a table of what each cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from agentspeed import Session, Usage


async def demonstrate(model: str | None) -> None:
    """Prints as it goes; ends with the table."""
    console = Console(width=min(100, Console().width))
    costs: list[tuple[str, Usage]] = []
    console.print("Starting an engine process ...")
    async with Session(model, system="You are a brief and friendly assistant.") as s:
        reply = await s.generate("Hello! Who are you?", max_tokens=40)
        console.print(f"[bold]first turn[/]   {reply.text}", highlight=False)
        costs.append(("first turn", reply.usage))
        mark = await s.mark()
        reply = await s.generate("Thank you!", max_tokens=40)
        console.print(f"[bold]second turn[/]  {reply.text}", highlight=False)
        costs.append(("second turn", reply.usage))
        async with s.fork(4) as branches:
            total = Usage()
            for branch in branches:
                reply = await branch.generate("What can you do?", max_tokens=24, temperature=1.0)
                total += reply.usage
                console.print(f"[bold]branch[/]       {reply.text}", highlight=False)
            costs.append(("four forks, a turn each", total))
            await s.adopt(branches[0])
        await s.rewind(mark)
        reply = await s.generate("Goodbye.", max_tokens=24)
        costs.append(("a turn after rewinding", reply.usage))
    table = Table("", "computed", "resumed", "recomputed", "drawn")
    for what, usage in costs:
        table.add_row(what, *(str(number) for number in (usage.new - usage.shared, usage.resumed, usage.recomputed,
                                                         usage.drawn)))
    console.print(table)
