"""What an engine process is started with: read from JSON, checked once, and turned into a core and a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import pages_for
from agentspeed_engine.models.catalog import describe, load
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.run.noop import NoopModel
from agentspeed_engine.run.vocabulary import Vocabulary
from agentspeed_engine.run.worker import Model
from agentspeed_engine.sched.config import CoreConfig

_NOOP = "noop:"
_MOST_DEFAULT_PAGES = 16_384
"""A default pool never asks for more pages than this: a million tokens is plenty until someone says otherwise."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All options of an engine process. Unknown names are refused."""

    model: str
    """A Hugging Face model folder; `noop:VOCABULARY:MILLISECONDS` for benchmarks of everything around a model."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    context_limit: int | None = None
    """None: the model's own, as far as the pool allows it."""
    pages: int | None = None
    """None: a quarter of the machine's memory."""
    page_tokens: int = 64
    threads: int | None = None
    prefill_chunk: int = 512
    extend_tokens: int = 256
    firm_pages: int | None = None
    max_sessions: int = 1024
    max_branches: int = 256
    max_waiting: int = 4096
    outbox_bytes: int = 1 << 20
    """Unsent bytes per link beyond which token deltas are coalesced."""
    check_every_step: bool = False
    """Run the ledger after every event (tests; it costs time in proportion to the pool)."""


def parse_options(text: str) -> EngineOptions:
    """Raises `EngineFault` (bad_config) naming what is wrong."""
    try:
        return msgspec.json.decode(text, type=EngineOptions)
    except msgspec.DecodeError as error:
        raise EngineFault("bad_config", f"The engine options are wrong: {error}.",
                          f"Known options: {', '.join(EngineOptions.__struct_fields__)}.") from error


@final
@dataclass(frozen=True, slots=True)
class Built:
    """What the options describe."""

    core: CoreConfig
    model: Model
    vocabulary: Vocabulary


def build(options: EngineOptions) -> Built:
    """Loads the model and sizes its pool. Raises `EngineFault` for whatever cannot be."""
    if options.page_tokens < 1:
        raise EngineFault("bad_config", f"page_tokens is {options.page_tokens}.", "Give at least 1.")
    if options.model.startswith(_NOOP):
        return _build_noop(options)
    folder = Path(options.model)
    info = describe(folder, dtype=options.dtype, page_tokens=options.page_tokens)
    pages, limit = _sizes(options, info.context_limit, info.bytes_per_page)
    core = _core(options, pages, limit, info.vocab_size, folder.name)
    core.check()
    model = load(folder, dtype=options.dtype, pages=pages, page_tokens=options.page_tokens, threads=options.threads)
    return Built(core, TorchModel(model), Vocabulary(folder, info.vocab_size, info.eos_ids))


def _build_noop(options: EngineOptions) -> Built:
    try:
        vocabulary, milliseconds = options.model.removeprefix(_NOOP).split(":")
        size, step = int(vocabulary), float(milliseconds) / 1000
    except ValueError as error:
        raise EngineFault("bad_config", f"{options.model!r} is not noop:VOCABULARY:MILLISECONDS.") from error
    pages, limit = _sizes(options, 65_536, 1)
    core = _core(options, pages, limit, size, options.model)
    return Built(core, NoopModel(size, step, options.page_tokens), Vocabulary(Path(options.model), size, ()))


def _core(options: EngineOptions, pages: int, limit: int, vocab_size: int, name: str) -> CoreConfig:
    return CoreConfig(
        pages=pages, context_limit=limit, vocab_size=vocab_size, model=name, page_tokens=options.page_tokens,
        prefill_chunk=options.prefill_chunk, extend_tokens=options.extend_tokens, firm_pages=options.firm_pages,
        max_sessions=options.max_sessions, max_branches=options.max_branches, max_waiting=options.max_waiting,
    )


def _sizes(options: EngineOptions, model_limit: int, bytes_per_page: int) -> tuple[int, int]:
    """(pages, context limit): what was asked for, else what the machine and the model give."""
    if options.context_limit is not None and not 1 <= options.context_limit <= model_limit:
        raise EngineFault("bad_config", f"context_limit is {options.context_limit}; the model has {model_limit}.",
                          "Give a number between 1 and the model's own limit.")
    wanted = options.context_limit or model_limit
    if options.pages is not None:
        fits = (options.pages - 1) * options.page_tokens
        return options.pages, wanted if options.context_limit else max(1, min(wanted, fits))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    pages = min(memory // 4 // bytes_per_page, max(_MOST_DEFAULT_PAGES, 2 * pages_for(wanted, options.page_tokens)))
    fits = (pages - pages // 4 - 2) * options.page_tokens
    if options.context_limit is None:
        return pages, max(1, min(wanted, fits))
    return pages, wanted


@final
class TorchModel:
    """A loaded model behind the worker's protocol: logits leave torch as float64."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.page_tokens = model.page_tokens

    def logits(self, batch: FlatBatch) -> NDArray[np.float64]:
        return np.asarray(self._model.forward(batch).double().numpy(), dtype=np.float64)

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        self._model.copy_rows(src_page, dst_page, rows)
