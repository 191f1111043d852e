"""What an engine process is started with: read from JSON, checked once, and turned into a core and a model."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.calibrate import calibrated
from agentspeed_engine.exec.executor import Executor
from agentspeed_engine.exec.model import Model
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.models.catalog import RANDOM, Dtype, describe, load, read_source
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.protocol.messages import as_text
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.serve import collector
from agentspeed_engine.serve.aside import aside
from agentspeed_engine.serve.capturing import captured
from agentspeed_engine.serve.noop_name import NOOP, noop_sizes
from agentspeed_engine.serve.place import placed
from agentspeed_engine.serve.rank_options import RankOptions
from agentspeed_engine.serve.rank_processes import RankProcesses
from agentspeed_engine.serve.rank_shares import check_ranks, shares_of
from agentspeed_engine.serve.rank_start import started
from agentspeed_engine.serve.recording import LEAST_BYTES, RecordingOrder
from agentspeed_engine.serve.sizing import sizes
from agentspeed_engine.wording import counted

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.lock_step import LockStep
    from agentspeed_kernels.platform import Platform
    from agentspeed_kernels.signature import CacheFormat

_NOOP_CONTEXT = 65_536
_NOOP_PAGE_BYTES = 1024
"""Of a model without rows: about what the engine itself keeps of a page."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All options of an engine process. Unknown names are refused."""

    model: str
    """A Hugging Face model folder; `random:CONFIG` for a model of that config.json (or folder) with weights by chance;
    `noop:VOCABULARY:MILLISECONDS` for benchmarks of everything around a model."""
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """Of weights, activations and cache. auto: bfloat16 where the checkpoint is in 16 bits or fewer and the processor
    has matrix units for it or multiplies pairs of it (AVX512-BF16), else float32; the engine says at its start which
    and why. The next two options keep weights, or the cache, in 8 bits beside it."""
    weights: Literal["dtype", "int8", "int8-32", "fp8"] = "dtype"
    """Format of the matrices alone. int8: 8 bits and a scale for each output, half of what bfloat16 reads; int8-32: a
    scale for each 32 inputs, nearer to the checkpoint; fp8: e4m3 and a scale for each block of 128 × 128, the bytes of
    a checkpoint that is published so (docs/how-to/kernels.md). On a CPU; fp8 on a GPU too."""
    kv_cache_dtype: Literal["dtype", "fp8"] = "dtype"
    """Format of the KV cache alone. fp8: e4m3 with a scale for each token and head, and the turned coordinates of
    latents in bfloat16: 57 % of bfloat16's bytes for DeepSeek's latents, 52 % for heads of 128, so that as much more
    context fits, at an accuracy that docs/performance.md gives (docs/how-to/kernels.md). Not for sparse attention."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where weights, cache and steps are. auto: the first GPU where one can be used, has kernels for the model's
    attention and room for its weights, else the CPU; the engine says at its start which GPU, or why none."""
    batch_invariant: bool = False
    """The logits of a row are the same bits whatever else is in the step, however its prompt was cut, shared or paged
    out: an answer does not depend on who else asks. Slower (docs/explanation/equality.md says what it costs). On one
    rank, in float32 or bfloat16."""
    context_limit: int | None = None
    """None: the model's own, as far as the pool allows it."""
    pages: int | None = None
    """None: a quarter of the memory that this process may use, or what the weights leave of it; on a GPU 0.85 of what
    the weights leave of its free memory. A pool nobody sized has at most 16 384 pages, or two turns of the context."""
    page_tokens: int = 64
    """Rows of a page; what is shared between branches is shared in whole pages."""
    threads: int | None = None
    """Of the CPU kernels, on each rank. None: as many as torch takes by itself, or the cores over the ranks."""
    tp: int = 1
    """Processes that the model is cut over: heads, widths, the vocabulary and experts (docs/how-to/ranks.md)."""
    dp: int = 1
    """Schedulers, each with `tp` processes, and a pool, host slots and limits as these options say. A session stays on
    the one where it was opened. Experts are spread over all processes (docs/how-to/ranks.md)."""
    ep: int | None = None
    """Groups of ranks (dp times tp) that have routed experts of their own; the ranks of a group cut each of theirs by
    its width. None: every rank is a group."""
    rank_seconds: float = 30.0
    """How long one rank waits for another, before the engine ends because of it."""
    depth: int | None = None
    """Steps planned ahead of the one that runs. None: 1 on a GPU, where the next step is on its way before the tokens
    of this one are on the host, else 0."""
    host_slots: int = 0
    """Pages of host memory that device pages can be saved to."""
    host_saves: Literal["measured", "always"] = "measured"
    """What is saved there before it leaves the device. measured: rows that two copies bring back sooner than a prefill
    would, by what both cost alone at the start; always: all that there is room for, so that a prefill of rows that were
    computed once never takes the time of other turns."""
    prefill_chunk: int = 512
    """Most tokens of cold prompts in a step."""
    extend_tokens: int = 256
    """Tokens of a step kept for short extends, so that a resumed session does not queue behind cold prompts."""
    firm_pages: int | None = None
    """Most pages under firm leases. None: a quarter of what one turn of the context limit leaves."""
    max_links: int = 256
    """Fronts connected at once (an event loop of a process is one); more are refused by name, as for all limits
    below."""
    max_sessions: int = 1024
    """Open at once."""
    max_branches: int = 256
    """Of one session."""
    max_waiting: int = 4096
    """Turns in the queue."""
    max_lease_seconds: float = 3600.0
    """The longest lease that is granted."""
    tenant_pages: int | None = None
    """Most device pages of one tenant: of its branches, and of rows that no branch of it has any more. Past it its own
    rows make room, then its turns wait. None: no quota."""
    tenant_sessions: int | None = None
    """Most sessions of one tenant. None: no quota."""
    turns_in_place: int | None = None
    """Turns of a session, of all its branches, that keep the place in the queue that its first one had. Where more
    sessions want the pool than it holds, those that have begun go on with their rows, and others wait until they have
    ended or had so many turns. 1: every turn goes to the end of the queue. None: 32, and 1 with a host tier, from where
    rows of those that wait come back without being computed."""
    policy: str = "next_use"
    """Who loses rows first under pressure; the others are there to compare with (`sched.policy`)."""
    ticket_deadline: float = 5.0
    """Seconds. A host copy counts as failed if it has not begun within half of them, counted from its order or from the
    end of the copy before it; one that began is waited for."""
    outbox_bytes: int = 1 << 20
    """Bytes per link encoded ahead of a late reader, at least 4096; what comes on top waits with its token deltas
    joined."""
    idle_seconds: float | None = None
    """Seconds without any session after which the engine ends by itself; who only watches does not count. None: never
    (an engine that was started for a session still ends with who started it)."""
    record: str = "crash"
    """What `agentspeed replay` runs again step by step (docs/how-to/replay.md). `crash`: only an engine that ends badly
    leaves a recording, in the user's state folder. `off`: none does. Else a folder, and every engine leaves one."""
    record_bytes: int = 64 << 20
    """Most bytes of this engine's recording, at least 65536; the oldest part goes when it is full."""
    record_content: bool = False
    """Record token ids and names of tenants, sessions and tools as they are, instead of stand-ins that tell only what
    equals what."""
    check_every_step: bool = False
    """Run the ledger after every event (tests; it costs time in proportion to the pool)."""


_MOST = 2**63 - 1
"""Larger numbers do not fit into a frame of the protocol."""
_RANGES: dict[str, tuple[int, int]] = {
    "context_limit": (1, _MOST),
    "pages": (1, _MOST),
    "page_tokens": (1, _MOST),
    "threads": (1, 1024),
    "tp": (1, 64),
    "dp": (1, 64),
    "ep": (1, _MOST),
    "depth": (0, _MOST),
    "host_slots": (0, _MOST),
    "prefill_chunk": (1, _MOST),
    "extend_tokens": (1, _MOST),
    "firm_pages": (0, _MOST),
    "max_links": (1, _MOST),
    "max_sessions": (1, _MOST),
    "max_branches": (1, _MOST),
    "max_waiting": (1, _MOST),
    "tenant_pages": (1, _MOST),
    "tenant_sessions": (1, _MOST),
    "turns_in_place": (1, _MOST),
    "outbox_bytes": (4096, _MOST),
    "record_bytes": (LEAST_BYTES, _MOST),
}
"""The least and the most of every whole number among the options."""
_TURNS_IN_PLACE = 32
"""Of an engine without a host tier: more than most agents take for what they are asked (decision 0074)."""
_LONGEST_WAIT = 86_400.0
"""Seconds that a rank may be waited for; the timers of sockets do not hold any number."""
_SECONDS = ("max_lease_seconds", "ticket_deadline", "idle_seconds", "rank_seconds")


def parse_options(text: str) -> EngineOptions:
    """Raises `EngineFault` (bad_options) naming what is wrong."""
    try:
        # Not `msgspec.json`: NaN and Infinity, which Python writes for them, shall be refused by their option's name.
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"they are no JSON: {error}", "Give one JSON object.") from error
    if not isinstance(given, dict):
        raise _wrong("they are no JSON object", "Give one, with an option's name for each value.")
    return _checked(_converted(given, strict=True))


def options_from(flags: Mapping[str, Any]) -> EngineOptions:
    """Options from values that may still be text. Raises `EngineFault` (bad_options) naming what is wrong."""
    return _checked(_converted(flags, strict=False))


def _converted(given: Mapping[str, Any], *, strict: bool) -> EngineOptions:
    """Each value by itself, so that what is wrong is told in an option's name and plain words."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(EngineOptions)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            raise _wrong(
                f"there is no option `{name}`",
                f"Do you mean `{close[0]}`?" if close else f"The options are: {', '.join(kinds)}.",
            )
        try:
            values[name] = msgspec.convert(value, kinds[name], strict=strict)
        except (msgspec.ValidationError, OverflowError) as error:
            raise _wrong(f"{name} is {value!r}", f"Give {_in_words(kinds[name])}.") from error
    if "model" not in values:
        raise _wrong("there is no `model`", "Give a model folder.")
    return EngineOptions(**values)


def _in_words(kind: Any) -> str:
    """A type as a person who gives a value thinks of it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "None"}
    arms = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return " or ".join(words[arm] if arm in words else f"one of {', '.join(get_args(arm))}" for arm in arms)


def _wrong(what: str, remedy: str) -> EngineFault:
    return EngineFault("bad_options", f"The engine options are wrong: {what}.", remedy)


def _checked(options: EngineOptions) -> EngineOptions:
    """Every number by itself; what contradicts another is found where it is used (`CoreConfig.check`, `_sizes`)."""
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise _wrong(
                f"{name} is {value}",
                f"Give {least} or more." if value < least and most == _MOST else f"Give {least} to {most}.",
            )
    for name in _SECONDS:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise _wrong(f"{name} is {value}", "Give a finite number of seconds above 0.")
    if options.batch_invariant and options.tp * options.dp > 1:
        raise _wrong(
            f"batch_invariant is asked for on {options.tp * options.dp} ranks", "Leave it out, or give one rank."
        )
    if options.rank_seconds > _LONGEST_WAIT:
        raise _wrong(f"rank_seconds is {options.rank_seconds:g}", f"Give {_LONGEST_WAIT:g} (a day) or less.")
    if options.record == "":
        raise _wrong("record is empty", "Give `crash`, `off` or a folder.")
    return options


def recording_of(options: EngineOptions, *, crashes: Path | None) -> RecordingOrder | None:
    """Where and what to record; None when nothing is. `crashes`: where a crash may leave one; None for nowhere."""
    crash_only = options.record == "crash"
    place = crashes if crash_only else None if options.record == "off" else Path(options.record)
    if place is None:
        return None
    return RecordingOrder(
        folder=place, most_bytes=options.record_bytes, content=options.record_content, crash_only=crash_only
    )


@final
@dataclass(frozen=True, slots=True)
class Built:
    """What the options describe."""

    core: CoreConfig
    model: Model
    vocabulary: Vocabulary
    source: str
    """The model's folder, all links followed; empty where there is no model."""
    executors: tuple[Executor, ...] = ()
    """Of every dp rank; none: the one that waits (`exec.cpu`)."""
    lock_step: LockStep | None = None
    """Takes the steps of all dp ranks together; None: each dp rank takes its own."""
    ranks: RankProcesses | None = None
    """The others, where the model is cut over several processes: whoever has this ends them."""

    def close(self) -> None:
        """Ends what belongs to it beside this process. A loop that has it does so when it ends."""
        if self.ranks is not None:
            self.ranks.close()


def build(
    options: EngineOptions,
    progress: Callable[[str], None] | None = None,
    part: Callable[[float], None] | None = None,
) -> Built:
    """Loads the model and sizes its pool. `progress` is told in words how far it is, and `part` what part of the
    weights was read. Raises `EngineFault` for whatever cannot be."""
    _ = _checked(options)
    say = progress if progress is not None else lambda what: None
    if options.model.startswith(NOOP):
        return _build_noop(options, say)
    folder = Path(options.model.removeprefix(RANDOM))
    with collector.at_rest():
        place = aside(lambda: placed(options))  # which loads torch
    device = place.device
    dtype, why = _dtype(options, place.platform)
    depth = options.depth if options.depth is not None else 1 if device == "cuda" else 0
    options = msgspec.structs.replace(options, dtype=dtype, device=device, depth=depth)
    cache = None if options.kv_cache_dtype == "dtype" else options.kv_cache_dtype
    weights = _weights(options, dtype, place.platform, cache)
    launches = device == "cuda" and dtype != "float64" and "triton" in place.platform.features
    info = describe(options.model, dtype=dtype, page_tokens=options.page_tokens, weights=weights, cache=cache)
    shares = shares_of(options, info, weights)
    pages, limit = sizes(
        options, info.context_limit, shares.bytes_per_page, shares.parameters, place.memory, shares.weight_bytes
    )
    core = _core(options, pages, limit, info.vocab_size, as_text(folder.name))
    core.check()
    if info.notice:
        say(info.notice)
    if place.said:
        say(place.said)
    if why:
        say(f"{dtype}: {why}")
    kept = "" if cache is None else f" in {cache}"
    say(
        f"loading {folder.name}: {info.weight_bytes / 1e6:.0f} MB of weights"
        f"{' (matrices in bfloat16, as they are stored)' if weights == 'bfloat16' else ''}, "
        f"{pages * shares.bytes_per_page / 1e6:.0f} MB for {counted(pages, 'page')}{kept}{shares.said}"
    )
    texts = folder if folder.is_dir() else folder.parent
    vocabulary = Vocabulary(texts, info.vocab_size, info.eos_ids)
    read = _steps(say, part or (lambda part: None), folder.name)
    source = str(folder.resolve())
    if options.dp * options.tp > 1:
        return _on_ranks(options, core, vocabulary, source, say, lock_step=shares.lock_step,
                         launches=launches and options.dp == 1, weights=weights, progress=read)  # fmt: skip
    with ThreadPoolExecutor(1) as beside:  # it takes the interpreter's lock for long, so no step may run beside it
        unusable = beside.submit(vocabulary.load)
        loaded = aside(
            lambda: load(
                options.model,
                dtype=dtype,
                pages=pages,
                page_tokens=options.page_tokens,
                threads=options.threads,
                device=device,
                weights=weights,
                cache=cache,
                batch_invariant=options.batch_invariant,
                progress=read,
            )
        )
    if unusable.result():
        say(f"turns with stop strings or a grammar will be refused: {unusable.result()}")
    # Imported late: a no-op engine starts without torch.
    from agentspeed_engine.exec.torch_model import TorchModel

    aside(partial(captured, loaded, core.context_limit, core.prefill_chunk + core.extend_tokens, say))
    model = TorchModel(loaded)
    if options.host_slots:
        model.reserve_host(options.host_slots)
        say("measuring what copies and prefill cost")
        core = aside(partial(calibrated, core, model))
    executors: tuple[Executor, ...] = ()
    if launches:
        from agentspeed_engine.exec.cuda import CudaExecutor

        executors = (CudaExecutor(model, vocabulary, depth=core.depth),)
    return Built(core, model, vocabulary, source, executors)


def _steps(say: Callable[[str], None], part: Callable[[float], None], name: str) -> Callable[[float], None]:
    """Says each tenth of a load once in words, and each hundredth as a number."""
    said = 0

    def told(read: float) -> None:
        nonlocal said
        before, said = said, max(said, int(100 * read))
        if said > before:
            part(said / 100)
        if said // 10 > before // 10:
            say(f"loading {name}: {said // 10 * 10} %")

    return told


def _dtype(options: EngineOptions, platform: Platform) -> tuple[Dtype, str]:
    """(format, why), no reason where it was asked for."""
    if options.dtype != "auto":
        return options.dtype, ""
    raw = read_source(options.model).raw
    # Imported late, as torch is.
    from agentspeed_engine.models.precision import choose

    return choose(raw, platform, None if options.kv_cache_dtype == "dtype" else options.kv_cache_dtype)


def _weights(
    options: EngineOptions, dtype: Dtype, platform: Platform, cache: CacheFormat | None
) -> WeightFormat | None:
    """What matrices are kept in: what was asked for, or what changes nothing; None: `dtype`."""
    if options.weights != "dtype":
        return options.weights
    # Imported late, as torch is.
    from agentspeed_engine.models.kept_weights import kept_weights

    return kept_weights(
        read_source(options.model), dtype, platform, cache=cache, batch_invariant=options.batch_invariant
    )


def _build_noop(options: EngineOptions, say: Callable[[str], None]) -> Built:
    size, step = noop_sizes(options.model)
    check_ranks(options, lambda mesh: [("vocabulary", size, mesh.tp)])
    options = msgspec.structs.replace(options, dtype="float32", device="cpu")  # it has no weights to compute with
    pages, limit = sizes(options, _NOOP_CONTEXT, _NOOP_PAGE_BYTES, 0)
    core = _core(options, pages, limit, size, options.model)
    core.check()
    vocabulary = Vocabulary(Path(options.model), size, ())
    if options.dp * options.tp > 1:
        return _on_ranks(options, core, vocabulary, "", say, lock_step=False)
    return Built(core, NoopModel(size, step, options.page_tokens), vocabulary, "")


def _on_ranks(
    options: EngineOptions,
    core: CoreConfig,
    vocabulary: Vocabulary,
    source: str,
    say: Callable[[str], None],
    *,
    lock_step: bool,
    weights: WeightFormat | None = None,
    launches: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Built:
    assert options.dtype != "auto" and options.device != "auto"
    given = RankOptions(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        pages=core.pages,
        page_tokens=options.page_tokens,
        threads=options.threads,
        host_slots=options.host_slots,
        tp=options.tp,
        ep=options.ep,
        rank=0,
        seconds=options.rank_seconds,
        dp=options.dp,
        lock_step=lock_step,
        launches=launches,
        depth=core.depth,
        context_limit=core.context_limit,
        most_new=core.prefill_chunk + core.extend_tokens,
        weights=weights,
        cache=None if options.kv_cache_dtype == "dtype" else options.kv_cache_dtype,
    )
    made = started(given, core, vocabulary, say, loads=bool(source), progress=progress)
    return Built(made.core, made.model, vocabulary, source, made.executors, made.lock_step, made.ranks)


def _core(options: EngineOptions, pages: int, limit: int, vocab_size: int, name: str) -> CoreConfig:
    return CoreConfig(
        pages=pages,
        context_limit=limit,
        vocab_size=vocab_size,
        model=name,
        page_tokens=options.page_tokens,
        prefill_chunk=options.prefill_chunk,
        extend_tokens=options.extend_tokens,
        firm_pages=options.firm_pages,
        max_links=options.max_links,
        max_sessions=options.max_sessions,
        max_branches=options.max_branches,
        max_waiting=options.max_waiting,
        depth=options.depth or 0,
        decode_ahead=options.device == "cuda" and bool(options.depth),
        host_slots=options.host_slots,
        host_saves=options.host_saves,
        ticket_deadline=options.ticket_deadline,
        max_lease_seconds=options.max_lease_seconds,
        tenant_pages=options.tenant_pages,
        tenant_sessions=options.tenant_sessions,
        turns_in_place=options.turns_in_place or (1 if options.host_slots else _TURNS_IN_PLACE),
        policy=options.policy,
    )
