"""What replies and events hold: where rows are, what was promised, what a turn cost, the engine as a person sees it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Keep = Literal["soft", "firm"]


class Residence(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Where the rows of a branch's known tokens are. The three add up to the tokens known."""

    device: int = 0
    host: int = 0
    lost: int = 0


class Lease(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What the engine promises about a branch at rest."""

    keep: Keep
    until: float | None
    """Seconds of the engine's monotonic clock. None where nobody announced how long the pause takes."""
    seconds: float
    """Seconds granted, from the moment of the answer; those that the engine expects where none were announced."""
    residence: Residence
    why: str


class Places(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The rows of a branch's known tokens by where they are, in tokens; the five add up to the tokens known."""

    device: int = 0
    both: int = 0
    """On the device, with a copy on the host."""
    host: int = 0
    loading: int = 0
    lost: int = 0
    """Never computed, or dropped since."""


class BranchView(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One branch as a person sees it."""

    branch: int
    parent: int | None
    """The branch it was forked from, while that exists."""
    state: str
    known: int
    places: Places
    lease: Lease | None
    tool: str
    """The tool a branch at rest waits for, as its front said."""
    tail_pages: int
    age: int | None
    """Of its turn; None at rest."""
    drawn: int
    """Tokens drawn in the running turn."""
    since: float
    """Seconds since its turn was queued, or since it came to rest."""
    waiting_for: str


class SessionView(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One session and those of its branches that are described, oldest first."""

    session: int
    tenant: str
    branches: tuple[BranchView, ...]
    branches_total: int
    label: str = ""
    """What its front calls it."""


class TurnUsage(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one turn cost. `resumed_device + resumed_host + recomputed + new` = tokens known before the first draw."""

    new: int = 0
    """Ids of this turn that were never computed before anywhere in the session."""
    resumed_device: int = 0
    resumed_host: int = 0
    recomputed: int = 0
    """Rows this branch had once and had to compute again (evicted, or less than a page after a lost seed)."""
    shared: int = 0
    """How many of the new ids another session, or a turn that was taken back, had computed."""
    drawn: int = 0
    preempted: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    why: str = ""
    """Why rows were recomputed; empty if none were."""


TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)
"""The files of a model that a client reads texts with: an engine serves these and no others."""


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A file as it was when the engine loaded the model."""

    name: str
    """Without a folder."""
    bytes: int
    sha256: str
    """In hexadecimal."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    id: int
    logprob: float


class RankView(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One process of an engine whose model is cut over several."""

    rank: int
    pid: int
    memory: int
    """Bytes that it has of the machine's memory."""
    waited: float | None = None
    """Seconds since the start that it waited for other ranks; None where nobody counts them (gloo, NCCL)."""
    dp: int = 0
    """The dp rank whose rows it computes."""


class DpView(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One of several schedulers of an engine, with a pool of its own."""

    pages: dict[str, int]
    """Of its pool, by owner."""
    slots: dict[str, int]
    counts: dict[str, int]
