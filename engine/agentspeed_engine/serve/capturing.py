"""Graphs of usual steps on a GPU, captured before anybody waits for one, with progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentspeed_engine.models.loaded import LoadedModel

_SAID = 16
"""How many graphs are captured between two lines that say so."""


def captured(
    model: LoadedModel,
    context_limit: int,
    most_new: int,
    say: Callable[[str], None],
    each: Callable[[int], None] = lambda count: None,
) -> None:
    """For contexts of up to `context_limit` tokens and up to `most_new` of prompts in a step. `each` is told the count
    of graphs with every one."""

    def told(count: int) -> None:
        each(count)
        if count % _SAID == 0:
            say(f"capturing steps: {count} graphs")

    whole = model.capture(context_limit, most_new, told)
    if model.graphs and not model.joins:
        say(f"{model.graphs} graphs of steps call modules one by one: joined steps are left out")
    if not whole:
        say(f"memory for {model.graphs} graphs of steps and no more: give fewer pages if steps shall be faster")
