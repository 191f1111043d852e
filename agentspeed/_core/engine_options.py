"""The options of an engine process by name, so that a misspelt one is found where it is written."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Literal, TypedDict

from agentspeed._base.validate import check_number, is_whole, shown
from agentspeed.errors import InvalidRequest


class EngineOptions(TypedDict, total=False):
    """What `Engine(model, ...)` and `Session(model, ...)` start an engine with; docs/reference/engine-options.md says
    what each one means and what it is by default."""

    dtype: Literal["auto", "float32", "float64", "bfloat16"]
    weights: Literal["dtype", "int8", "int8-32", "fp8"]
    kv_cache_dtype: Literal["dtype", "fp8"]
    device: Literal["auto", "cpu", "cuda"]
    batch_invariant: bool
    context_limit: int | None
    pages: int | None
    page_tokens: int
    threads: int | None
    tp: int
    dp: int
    ep: int | None
    rank_seconds: float
    depth: int
    host_slots: int
    host_saves: Literal["measured", "always"]
    prefill_chunk: int
    extend_tokens: int
    firm_pages: int | None
    max_links: int
    max_sessions: int
    max_branches: int
    max_waiting: int
    max_lease_seconds: float
    tenant_pages: int | None
    tenant_sessions: int | None
    turns_in_place: int | None
    policy: str
    ticket_deadline: float
    outbox_bytes: int
    idle_seconds: float | None
    record: str | os.PathLike[str]
    record_bytes: int
    record_content: bool
    check_every_step: bool


def checked_engine_options(options: Mapping[str, object]) -> dict[str, str | int | float | None]:
    """The options as they travel to the process: paths as text. Raises `InvalidRequest` for a name that no engine has
    and for a value that is no plain one; ranges are the engine's to check."""
    known = EngineOptions.__annotations__
    checked: dict[str, str | int | float | None] = {}
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise InvalidRequest(
                f"An engine has no option {name}.",
                remedy=f"Do you mean {close[0]}?" if close else f"The options are: {', '.join(known)}.",
            )
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        if plain is not None and not isinstance(plain, str | int | float):
            raise InvalidRequest(f"{name} is {shown(value)}; an engine option is a number, a text, or None.")
        if is_whole(plain):
            check_number(name, plain)
        checked[name] = plain
    return checked
