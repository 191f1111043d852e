"""Every message between a client and an engine.

A client sends `Command`s; each carries a `request` number of the client's own and is answered by exactly one reply
that repeats it. `Generate` is answered by `Done` when the turn is queued; its tokens and its end follow as events. The
engine sends `Outbox`es: all messages of one step for one link, in order. `frames` says how both are written,
`token_ids` how token ids are, and `values` what several messages hold.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agentspeed_engine.protocol.codes import RETRYABLE
from agentspeed_engine.protocol.values import TEXT_FILES as TEXT_FILES
from agentspeed_engine.protocol.values import BranchView as BranchView
from agentspeed_engine.protocol.values import DpView as DpView
from agentspeed_engine.protocol.values import Keep as Keep
from agentspeed_engine.protocol.values import Lease as Lease
from agentspeed_engine.protocol.values import ModelFile as ModelFile
from agentspeed_engine.protocol.values import Places as Places
from agentspeed_engine.protocol.values import RankView as RankView
from agentspeed_engine.protocol.values import Residence as Residence
from agentspeed_engine.protocol.values import SessionView as SessionView
from agentspeed_engine.protocol.values import TopLogprob as TopLogprob
from agentspeed_engine.protocol.values import TurnUsage as TurnUsage

PROTOCOL = 5
"""Raised whenever a message changes its meaning; `Hello` with another number is refused."""

FinishReason = Literal["stop_id", "stop_string", "grammar_end", "max_tokens", "cancelled", "forked", "closed", "error"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of everything on the wire."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How one turn draws its tokens. Temperature 0 is greedy; so is all below `sampling.LEAST_TEMPERATURE`.

    The logits become those that are drawn from in this order: the repetition penalty, the frequency and presence
    penalties and the bias, the grammar's mask, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    logprobs: int | None = None
    """None: no logprobs. 0: of the drawn token. k: also of the k most likely ones (at most 20)."""
    frequency_penalty: float = 0.0
    """Taken from an id's logit for each time that it stands in the message so far (`Generate.penalty_consumed`)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of an id that stands there."""
    repetition_penalty: float = 1.0
    """Divides the logit of an id that stands anywhere in the log so far where it is above 0, and multiplies it where it
    is below (Keskar et al. 2019)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit)."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A constraint on the turn's tokens, as llguidance takes it (a lark/json/regex grammar, serialised)."""

    source: str
    consumed: int = 0
    """How many ids at the end of the log the matcher must first consume: a turn continued after a live fork."""


# ---- commands -----------------------------------------------------------------------------------------------------
class Hello(Message, frozen=True, kw_only=True):
    """The first frame on every link."""

    request: int
    protocol: int = PROTOCOL
    client: str = ""
    credential: str = ""
    """What an engine that asks for one wants to see (`protocol.credential`)."""


class Open(Message, frozen=True, kw_only=True):
    """A new session whose root branch starts with `ids` (perhaps none), at the longest match in the tree."""

    request: int
    ids: bytes = b""
    tenant: str = ""
    private: bool = False
    seed: int = 0
    computed: int = 0
    """Rows of these ids that an earlier engine had computed: what must be computed again counts as recomputed, not
    new. More than there are ids counts as all of them."""
    label: str = ""
    """What its front calls the session: shown to who watches the engine, and used for nothing else."""


class Append(Message, frozen=True, kw_only=True):
    """Ids at the end of a branch at rest; nothing is computed."""

    request: int
    branch: int
    ids: bytes


class Generate(Message, frozen=True, kw_only=True):
    """One turn: append `ids`, compute, then draw up to `max_tokens`. `max_tokens=0` only prefills."""

    request: int
    branch: int
    ids: bytes = b""
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[bytes, ...] = ()
    grammar: Grammar | None = None
    seed: int | None = None
    """Overrides the draw key's session seed for this turn, which makes it reproducible."""
    stop_consumed: int = 0
    """How many ids at the end of the log may have begun a stop string: of a message that an earlier turn was cut in."""
    penalty_consumed: int = 0
    """How many ids at the end of the log belong to the message that this turn goes on with: the frequency and presence
    penalties count them."""


class Cancel(Message, frozen=True, kw_only=True):
    """Ends the running or queued turn of a branch. Answered by `Done` once the branch is at rest.

    `cut`: known tokens to go back to after the stop; None keeps all. On a branch at rest it is `Done` at once
    (and the cut still applies)."""

    request: int
    branch: int
    cut: int | None = None


class Fork(Message, frozen=True, kw_only=True):
    """`n` children at rest. Legal while a turn runs: the children share the log up to the last committed token."""

    request: int
    branch: int
    n: int
    at: int | None = None
    """A token position of a branch at rest; None forks at its end."""


class Rewind(Message, frozen=True, kw_only=True):
    """The log goes back to its first `tokens` ids."""

    request: int
    branch: int
    tokens: int


class Adopt(Message, frozen=True, kw_only=True):
    """The trunk takes the child's log and leaf; the child is closed."""

    request: int
    branch: int
    child: int


class Close(Message, frozen=True, kw_only=True):
    """Ends a branch; a root branch's session ends with its last branch."""

    request: int
    branch: int


class Expect(Message, frozen=True, kw_only=True):
    """The front expects to use a branch at rest again."""

    request: int
    branch: int
    seconds: float | None
    """In so many seconds. None: nobody knows, and the engine goes by the pauses it has seen, of the tool if it is
    named; not for a firm lease, which needs an end."""
    keep: Keep = "soft"
    tool: str = ""
    """Name of the tool that is running, for the learnt distribution of pauses."""


class Inspect(Message, frozen=True, kw_only=True):
    """State and residence of one branch."""

    request: int
    branch: int


class GetStats(Message, frozen=True, kw_only=True):
    """Counts of the whole engine."""

    request: int


class Look(Message, frozen=True, kw_only=True):
    """The whole engine for a person who watches it: a bounded picture, never a token."""

    request: int
    branches: int = 200
    """Most branches described; busy ones come first, the others are counted (`MAX_LOOK` at most)."""


MAX_LOOK = 1000


class GetModelFiles(Message, frozen=True, kw_only=True):
    """Which files a client needs to make ids of text and text of ids: tokenizer, chat template, configuration."""

    request: int


class ReadModelFile(Message, frozen=True, kw_only=True):
    """A part of one of them. Ask for the next part when this one has come."""

    request: int
    name: str
    offset: int


Command = (
    Hello
    | Open
    | Append
    | Generate
    | Cancel
    | Fork
    | Rewind
    | Adopt
    | Close
    | Expect
    | Inspect
    | GetStats
    | Look
    | GetModelFiles
    | ReadModelFile
)


# ---- replies ------------------------------------------------------------------------------------------------------
class Welcome(Message, frozen=True, kw_only=True):
    """The answer to `Hello`: what this engine is."""

    request: int
    protocol: int
    engine: str
    model: str
    vocab_size: int
    context_limit: int
    page_tokens: int
    pages: int
    host_slots: int
    pid: int
    limits: dict[str, int]
    source: str = ""
    """The model's folder, all links followed; empty for an engine without one, which takes any ids."""


class Done(Message, frozen=True, kw_only=True):
    """The command was carried out; `known` is the branch's log length after it."""

    request: int
    known: int = 0


class Opened(Message, frozen=True, kw_only=True):
    request: int
    branch: int
    residence: Residence


class Forked(Message, frozen=True, kw_only=True):
    request: int
    branches: tuple[int, ...]
    known: int


class LeaseAnswer(Message, frozen=True, kw_only=True):
    request: int
    lease: Lease


class Inspected(Message, frozen=True, kw_only=True):
    request: int
    state: str
    known: int
    residence: Residence
    lease: Lease | None
    waiting_for: str = ""
    tenant_pages: int = 0
    """Device pages of its tenant, all its sessions and cached rows together."""
    tenant_quota: int | None = None
    """Most that it may have."""


class Stats(Message, frozen=True, kw_only=True):
    """`counts`: names of the design's owners and states to their numbers (docs/reference)."""

    request: int
    counts: dict[str, int]
    seconds: dict[str, float]
    dp: tuple[dict[str, int], ...] = ()
    """Of every dp rank, what `counts` has the sum of; none where there is one."""


class Picture(Message, frozen=True, kw_only=True):
    """The answer to `Look`."""

    request: int
    clock: float
    """The engine's monotonic clock when it was taken; leases end by it."""
    sessions: tuple[SessionView, ...]
    pages: dict[str, int]
    """Device pages by owner; they add up to the pool (docs/how-to/watching.md)."""
    slots: dict[str, int]
    counts: dict[str, int]
    tenants: dict[str, int] = {}
    """Device pages of each tenant with a session in the picture, the shared and the cached ones included."""
    tenant_quota: int | None = None
    """Most pages that one may have."""
    ranks: tuple[RankView, ...] = ()
    """Of the model, rank 0 first; none where one process has all of it."""
    dp: tuple[DpView, ...] = ()
    """Of every dp rank, what `pages`, `slots` and `counts` have the sum of; none where there is one."""


class ModelFiles(Message, frozen=True, kw_only=True):
    """The answer to `GetModelFiles`; none of an engine that computes nothing."""

    request: int
    files: tuple[ModelFile, ...]


class FilePart(Message, frozen=True, kw_only=True):
    """The answer to `ReadModelFile`: what stands at the offset, at most 1 MiB; nothing at the file's end."""

    request: int
    data: bytes


class Failed(Message, frozen=True, kw_only=True):
    """The command was refused; nothing changed."""

    request: int
    code: str
    message: str
    remedy: str = ""

    @property
    def retryable(self) -> bool:
        """Whether the same command may succeed later; the code says it."""
        return self.code in RETRYABLE


# ---- events -------------------------------------------------------------------------------------------------------
class TurnStarted(Message, frozen=True, kw_only=True):
    """The turn was admitted: what was resumed is known now."""

    branch: int
    usage: TurnUsage


class Tokens(Message, frozen=True, kw_only=True):
    """Ids drawn for one branch, in order: of one step, or of several when the link's reader is late."""

    branch: int
    ids: bytes
    logprobs: tuple[float, ...] = ()
    """Of the drawn ids in the softmax of the model's own logits; empty unless the turn asked for any."""
    top: tuple[tuple[TopLogprob, ...], ...] = ()
    """Of the likeliest ids in the same."""
    draw_logprobs: tuple[float, ...] = ()
    """Of the drawn ids in the distribution that they were drawn from; empty where `logprobs` is."""


class TurnEnded(Message, frozen=True, kw_only=True):
    """The last event of a turn; the branch is at rest (or closed) with `known` ids in its log."""

    branch: int
    reason: FinishReason
    known: int
    usage: TurnUsage
    message: str = ""
    """Of "error": what went wrong. Of "max_tokens": what bounds the turn when that is less than was asked."""


class LeaseChanged(Message, frozen=True, kw_only=True):
    """A lease was answered differently later, or rows moved; `why` says what happened."""

    branch: int
    lease: Lease


Reply = Welcome | Done | Opened | Forked | LeaseAnswer | Inspected | Stats | Picture | ModelFiles | FilePart | Failed
Event = TurnStarted | Tokens | TurnEnded | LeaseChanged
Outgoing = Reply | Event


class Outbox(msgspec.Struct, frozen=True, array_like=True):
    """One frame from the engine: everything one step (or one command) has for this link, in order."""

    messages: tuple[Outgoing, ...]


def as_text(name: str) -> str:
    """A file's name as a message can carry it: bytes that are no UTF-8, which Python keeps as lone surrogates, written
    out as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
