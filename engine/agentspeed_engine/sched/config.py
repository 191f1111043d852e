"""What the core is told at its start, checked once (L1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import pages_for
from agentspeed_engine.sched.policy import POLICIES


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Limits and quanta. Every queue and table has a bound here."""

    pages: int
    context_limit: int
    vocab_size: int
    model: str = ""
    adapter: str = ""
    page_tokens: int = 64
    prefill_chunk: int = 512
    """Most tokens of cold prompts in a step, of all of them together."""
    extend_tokens: int = 256
    """Tokens of a step kept for short extends (resumes), so that they do not queue behind cold prompts."""
    depth: int = 0
    """Plans in flight beyond the first."""
    decode_ahead: bool = False
    """A turn may have a decode row issued while the token that the row is fed with is still in flight. The executor
    must keep what a step sampled for the steps planned meanwhile (`exec.executor`); it takes a depth of 1 or more."""
    prepares: bool = False
    """Turns with a grammar or stop strings wait until the loop says that the executor is ready for them
    (`Core.preparations`, `Core.prepared`). Else the step that samples them first makes that ready."""
    host_slots: int = 0
    host_saves: Literal["measured", "always"] = "measured"
    """Which rows that leave the device are saved there first: those for which two copies cost less than computing them
    again, or all."""
    firm_pages: int | None = None
    """Most pages under firm leases; None: a quarter of what L1 leaves."""
    max_links: int = 256
    """Fronts connected at once."""
    max_sessions: int = 1024
    max_branches: int = 256
    """Of one session."""
    max_waiting: int = 4096
    ticket_deadline: float = 5.0
    max_lease_seconds: float = 3600.0
    tenant_pages: int | None = None
    """Most device pages of one tenant, cached rows included (`sched.quotas`); None: no quota."""
    tenant_sessions: int | None = None
    turns_in_place: int = 1
    """Turns of a session that have the age of the first (`sched.places`). 1: each has its own."""
    policy: str = "next_use"
    """Who loses rows first (`sched.policy`); all but the default are there to compare with."""
    dp: int = 1
    """Schedulers of one engine: branches of the i-th (`dp_index`) have the numbers that leave i when divided by it."""
    dp_index: int = 0
    copy_seconds_per_token: float = 0.0
    """Measured at start: one token's rows to the host or back. 0: not measured."""
    recompute_seconds_per_token: float = 0.0
    """Measured at start: one token of cold prefill. 0: not measured."""

    def firm_budget(self) -> int:
        """F: pages that may be under firm leases at once."""
        return max(0, self.pages - self.turn_pages()) // 4 if self.firm_pages is None else self.firm_pages

    def turn_pages(self) -> int:
        """What one turn of the context limit takes: its rows, and a page to copy the end of its prefix from, which
        stays whose it was until the copy is made."""
        return pages_for(self.context_limit, self.page_tokens) + 1

    def check(self) -> None:
        """Raises `EngineFault` (bad_options) for what would let a turn wait for ever."""
        for name in (
            "pages",
            "context_limit",
            "vocab_size",
            "page_tokens",
            "prefill_chunk",
            "extend_tokens",
            "max_links",
            "max_sessions",
            "max_branches",
            "max_waiting",
            "turns_in_place",
        ):
            if getattr(self, name) < 1:
                raise EngineFault("bad_options", f"{name} is {getattr(self, name)}.", "Give at least 1.")
        for name in ("tenant_pages", "tenant_sessions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineFault("bad_options", f"{name} is {value}.", "Give at least 1, or None for no quota.")
        if self.depth < 0 or self.host_slots < 0 or (self.firm_pages is not None and self.firm_pages < 0):
            raise EngineFault("bad_options", "depth, host_slots and firm_pages cannot be negative.")
        if not 0 <= self.dp_index < self.dp:
            raise EngineFault("bad_options", f"There is no dp rank {self.dp_index} of {self.dp}.")
        if self.decode_ahead and not self.depth:
            raise EngineFault("bad_options", "decode_ahead needs steps that are planned ahead.", "Give a depth of 1.")
        if self.policy not in POLICIES:
            raise EngineFault("bad_options", f"There is no policy {self.policy!r}.", f"One of: {', '.join(POLICIES)}.")
        for name in ("ticket_deadline", "max_lease_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise EngineFault("bad_options", f"{name} is {getattr(self, name)}.", "Give seconds above 0.")
        if self.copy_seconds_per_token < 0 or self.recompute_seconds_per_token < 0:
            raise EngineFault("bad_options", "Costs cannot be negative.")
        if self.pages - self.firm_budget() < self.turn_pages():
            raise EngineFault(
                "bad_options",
                f"The pool has {self.pages} pages of {self.page_tokens} tokens, {self.firm_budget()} of them for firm "
                f"leases; one turn of the context limit ({self.context_limit} tokens) needs {self.turn_pages()} "
                "(rule L1: its own pages and one to copy from).",
                "Give more pages, a smaller context limit, or fewer firm pages.",
            )
