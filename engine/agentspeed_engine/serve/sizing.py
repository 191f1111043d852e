"""Sizes a pool and a context limit for a model and a machine, and refuses what cannot fit before a weight is read."""

from __future__ import annotations

from typing import Literal, Protocol

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import pages_for
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.serve.memory_limit import MemoryLimit, memory_limit
from agentspeed_engine.spmd.report import SPARE_PART
from agentspeed_engine.wording import counted

_MOST_DEFAULT_PAGES = 16_384
"""A default pool never asks for more pages than this: a million tokens is plenty until someone says otherwise."""
_BYTES_EACH = 1.1
"""Of a parameter in 8 bits, with its share of scales and of what is not kept so: a guess for advice."""
_IDLE_SHARE = 0.85
"""Of what weights leave of memory that lies idle; the rest is for activations and compiled steps."""


class PoolOptions(Protocol):
    """What of the engine's options a pool is sized by."""

    @property
    def dtype(self) -> Literal["auto", "float32", "float64", "bfloat16"]: ...
    @property
    def weights(self) -> Literal["dtype", "int8", "int8-32", "fp8"]: ...
    @property
    def context_limit(self) -> int | None: ...
    @property
    def pages(self) -> int | None: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def host_slots(self) -> int: ...
    @property
    def firm_pages(self) -> int | None: ...


def sizes(
    options: PoolOptions,
    model_limit: int,
    bytes_per_page: int,
    parameters: int,
    limit: MemoryLimit | None = None,
    weight_bytes: int | None = None,
) -> tuple[int, int]:
    """(Pages, context limit): what was asked for, else what the memory and the model give (rule L1).

    `bytes_per_page` is of the options' dtype, and so are weights unless `weight_bytes` says what they take. Raises
    `EngineFault`: bad_options, or out_of_memory where the weights alone are too large.
    """
    memory = memory_limit() if limit is None else limit
    # A format that is not chosen yet counts as the wider of the two that it may become.
    dtype: str = "float32" if options.dtype == "auto" else options.dtype
    if options.context_limit is not None and options.context_limit > model_limit:
        raise EngineFault(
            "bad_options",
            f"context_limit is {options.context_limit}; the model has {model_limit}.",
            "Give a number between 1 and the model's own limit.",
        )
    weights = parameters * DTYPE_BYTES[dtype] if weight_bytes is None else weight_bytes
    if weight_bytes is None:
        _weights_fit(dtype, parameters, memory)
    elif _room(memory, weights) <= 0:
        kept = "16 bits" if options.weights == "dtype" else "8 bits"
        raise _too_large(f"{_size(weights)} in {kept}", memory, _smaller(parameters, memory, options.weights))
    host, beside_slots = (memory_limit(), 0) if memory.idle else (memory, weights)
    for what, count, held, taken in (
        ("pages", options.pages or 0, memory, weights),
        ("host_slots", options.host_slots, host, beside_slots),
    ):
        if count * bytes_per_page + taken > held.bytes:
            beside = f" beside {_size(taken)} of weights" if taken else ""
            raise EngineFault(
                "bad_options",
                f"{what} is {count}; that many take {_size(count * bytes_per_page)}{beside}, {held.owner} has "
                f"{_size(held.bytes)}.",
                f"Give fewer {what}, or leave `{what}` out.",
            )
    wanted = options.context_limit or model_limit
    pages = options.pages
    if pages is None:
        most = max(_MOST_DEFAULT_PAGES, 2 * pages_for(wanted, options.page_tokens) + (options.firm_pages or 0))
        room = int(_IDLE_SHARE * (memory.bytes - weights)) if memory.idle else memory.bytes // 4
        room = min(room, _room(memory, weights))
        pages = min(room // bytes_per_page, most)
        _holds_a_turn(options, pages, bytes_per_page, memory, weights)
    if options.context_limit is not None:
        return pages, wanted
    return pages, min(wanted, _fitting_context(options, pages))


def _holds_a_turn(options: PoolOptions, pages: int, bytes_per_page: int, memory: MemoryLimit, weights: int) -> None:
    """Of a pool that nobody sized: what its user can do is not to give more pages than none."""
    firm, asked = options.firm_pages or 0, options.context_limit
    turn = 2 if asked is None else pages_for(asked, options.page_tokens) + 1
    if pages >= turn + firm:
        return
    fits = (pages - firm - 1) * options.page_tokens
    room = (turn + firm) * bytes_per_page
    ways = [
        *([f"pages={turn + firm}, which take {_size(room)}"] if room <= _room(memory, weights) else []),
        *([f"context_limit={fits} or less"] if asked is not None and fits > 0 else []),
        *(["fewer `firm_pages`"] if firm else []),
        *(["a smaller `page_tokens`"] if pages < 2 else []),
        "a smaller `dtype`",
        "kv_cache_dtype='fp8'",
    ]
    needs = f"a turn{'' if asked is None else f' of context_limit {asked}'} needs {turn} pages (rule L1)"
    raise EngineFault(
        "bad_options",
        f"A page of {counted(options.page_tokens, 'token')} takes {_size(bytes_per_page)}; {memory.owner} has "
        f"{_size(memory.bytes)}, of which the weights take {_size(weights)}: a pool that nobody sized has "
        f"{counted(pages, 'page')}, and {needs}{f', beside {firm} for firm leases' if firm else ''}.",
        f"Give {', '.join(ways[:-1])} or {ways[-1]}, or take more memory.",
    )


def _fitting_context(options: PoolOptions, pages: int) -> int:
    firm = options.firm_pages
    if firm is None:
        # Firm leases get a share of a pool that was sized for them, and only what is left of one that the user sized,
        # or of one that holds no more than a turn.
        firm = min(pages // 4 + 1, pages - 2) if options.pages is None else 0
    fits = (pages - firm - 1) * options.page_tokens
    if fits < 1:
        raise EngineFault(
            "bad_options",
            f"The pool has {counted(pages, 'page')}, {firm} of them for firm leases, and a turn needs 2 (rule L1).",
            f"Give {firm + 2} pages or more{', or fewer firm pages' if firm else ''}.",
        )
    return fits


def _weights_fit(dtype: str, parameters: int, memory: MemoryLimit) -> None:
    fitting = [name for name, item in DTYPE_BYTES.items() if not parameters or _room(memory, parameters * item) > 0]
    if dtype in fitting:
        return
    others = [name for name in fitting if DTYPE_BYTES[name] < DTYPE_BYTES[dtype]]
    remedy = _smaller(parameters, memory)
    if others:
        best = max(others, key=lambda name: DTYPE_BYTES[name])
        remedy = f"Give dtype={best!r}, with which they take {_size(parameters * DTYPE_BYTES[best])}."
    raise _too_large(f"{_size(parameters * DTYPE_BYTES[dtype])} in {dtype}", memory, remedy)


def _smaller(parameters: int, memory: MemoryLimit, weights: str = "dtype") -> str:
    """What to do about weights that are too large in 16 bits and more, or in the 8 bits of `weights`."""
    eight = int(parameters * _BYTES_EACH)
    if weights == "dtype" and not memory.idle and _room(memory, eight) > 0:
        return f"Give weights='int8', with which they take about {_size(eight)}."
    return "Take a smaller model or more memory."


def _too_large(what: str, memory: MemoryLimit, remedy: str) -> EngineFault:
    aside = _size(memory.bytes // SPARE_PART)
    said = f"The weights take {what}, {memory.owner} has {_size(memory.bytes)}, of which {aside} are for steps."
    return EngineFault("out_of_memory", said, remedy)


def _room(memory: MemoryLimit, weights: int) -> int:
    """Bytes for a pool beside so many of weights."""
    return memory.bytes - memory.bytes // SPARE_PART - weights


def _size(count: int) -> str:
    if count < 1e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"
