"""A model in memory: its compiled chain, its cache, and the moves of pages the engine orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.checkpoint import Checkpoint
from agentspeed_engine.models.held_weights import held_by, tensors_of
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.inputs_on_device import upload
from agentspeed_engine.models.joined import joined
from agentspeed_engine.models.kernel_refusals import kernels_chosen
from agentspeed_engine.models.kv_pools import TORCH_DTYPES, KvPools
from agentspeed_engine.models.memory import given_back, in_large_pages
from agentspeed_engine.models.programs import Programs
from agentspeed_engine.models.quantization import declared_scheme
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.source import Dtype, ModelInfo, ModelSource
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.models.weights import OnDevice, RandomWeights, WeightSource
from agentspeed_engine.spmd.lower import Comm, Compiled, lower, run
from agentspeed_engine.spmd.placement import ONE, Rank
from agentspeed_engine.spmd.plan import Plan, fuse, plan
from agentspeed_engine.spmd.spec import TOKEN_SHARD
from agentspeed_kernels.attention import NEVER, AttentionBackend
from agentspeed_kernels.cpu.attention_plan import CpuAttention
from agentspeed_kernels.ops import CACHE_OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import UNBOUNDED, Kernels, Preferences
from agentspeed_kernels.signature import DTYPE_BYTES, CacheFormat, Device
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.uploads import unwaited
from agentspeed_kernels.workspace import Workspace

if TYPE_CHECKING:
    from agentspeed_engine.models.graphs import Graphs
    from agentspeed_kernels.triton.backend import TritonAttention


def weight_source(
    source: ModelSource,
    dtype: Dtype,
    device: torch.device | None = None,
    progress: Callable[[float], None] | None = None,
    *,
    weights: WeightFormat | None = None,
) -> WeightSource:
    """The files of a folder, checked, or chance, on a device (None: the CPU). `progress` is told what part of the files
    was read; `weights`: what matrices are kept in, and given so where they are stored so. Raises `EngineFault`."""
    if source.random:
        shapes = dict(source.family.shapes(source.config))
        kept = TORCH_DTYPES["bfloat16" if weights == "bfloat16" else dtype]
        return RandomWeights(shapes, TORCH_DTYPES[dtype], device=str(device or "cpu"), kept=kept)
    scheme = declared_scheme(source.raw, source.path)
    files = Checkpoint(source.path, source.family, source.config, TORCH_DTYPES[dtype], progress, scheme, weights)
    return files if device is None or device.type == "cpu" else OnDevice(files, device)


_NO_ROOM = ("out of memory", "ALLOC_FAILED")
"""In what torch, the driver and the vendor's libraries say when they have no room: only torch has a class for it."""


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Names what a GPU had no room for, as an `EngineFault` (out_of_memory)."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_ROOM):
            raise
        said = str(error).split(". ", 1)[0]
        raise EngineFault(
            "out_of_memory",
            f"The GPU has no room for {what}: {said}.",
            "Give fewer pages, a smaller prefill_chunk, or device='cpu'; see what else runs on the GPU (nvidia-smi).",
        ) from error


@final
class LoadedModel:
    """One rank's piece, which is the whole where there is one rank. Not thread-safe: one worker thread drives it."""

    def __init__(
        self,
        source: ModelSource,
        info: ModelInfo,
        *,
        dtype: Dtype,
        pages: int,
        page_tokens: int,
        threads: int | None,
        device: Device = "cpu",
        weights: WeightFormat | None = None,
        cache: CacheFormat | None = None,
        rank: Rank = ONE,
        comm: Comm | None = None,
        recordable: bool = True,
        agree: Callable[[bool], bool] | None = None,
        whole_logits: bool = False,
        batch_invariant: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """`info.kv` is that of the rank, in the format `cache`. `comm`: its collectives, where there are several;
        `recordable`: whether steps that have them may be repeated; `agree`: whether all ranks say what this one says.
        `whole_logits`: of all ids on every rank, not of its own. `batch_invariant`: logits of a row have the same bits
        in any step. Raises `EngineFault` for weights that have gone bad, bad_config for a mesh that does not divide the
        model, bad_options for kernels that cannot be chosen, and out_of_memory where a GPU has no room."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.info = info
        self.page_tokens = page_tokens
        self.device = torch.device(device)
        self.dtype: Dtype = dtype
        held = weight_source(source, dtype, self.device, progress, weights=weights)
        self.pools = KvPools(info.kv, pages, page_tokens, self.device)
        sizes = {"page_tokens": page_tokens, **source.family.sizes(source.config, rank.mesh)}
        with kernels_chosen(batch_invariant=batch_invariant):
            preferences = Preferences.from_environment()
            joins = preferences.joins and not batch_invariant
            self._kernels = Kernels(
                standard(),
                detect(device),
                dtype,
                source.family.ops_on(device, joins=joins, invariant=batch_invariant),
                sizes=sizes,
                preferences=preferences,
                check=conformance.objection,
                weights=weights,
                cache=cache,
                invariant=batch_invariant,
                optional=CACHE_OPS.intersection(source.family.joined_ops),
            )
        if batch_invariant and self.device.type == "cuda":
            _adds_alike(self.device)
        with given_back():
            chain = source.family.build(source.config, held, self.pools, rank, self._kernels)
            self._kernels.laid_out()
        if self.device.type == "cpu":
            pools = {pool.untyped_storage().data_ptr() for pool in self.pools.tensors}
            held_here = [one for weight in held_by(chain) for one in tensors_of(weight)]
            in_large_pages(one for one in held_here if one.untyped_storage().data_ptr() not in pools)
        if progress is not None:  # of experts that live elsewhere nothing was read
            progress(1.0)
        boundaries = [module.boundary for module in chain]
        # Else logits stay cut as the head gives them: what is drawn from them is decided by all ranks together.
        finish = TOKEN_SHARD if whole_logits else boundaries[-1].output
        self.plan: Plan = fuse(plan(boundaries, rank.mesh, start=TOKEN_SHARD, finish=finish), boundaries)
        self.first_id = 0 if whole_logits else rank.tp * (info.vocab_size // rank.mesh.tp)
        """Of the ids whose logits it gives."""
        self._steps = lower(self.plan, chain, comm)
        self._programs = Programs(self._steps, self._kernels, source.family.ops)
        self._programs.allowed = recordable
        self._rope = Rope(source.config.rope, source.config.context_limit, TORCH_DTYPES[dtype], self.device)
        self._workspace = Workspace(self.device)
        self._attention = _attention(self._kernels, source.family.ops, sizes, self.device)
        self._graphs: Graphs | None = None
        repeated = comm is None or (recordable and agree is not None)
        if self.device.type == "cuda" and repeated and not isinstance(self._attention, CpuAttention):
            # Imported late: only a GPU's kernels need it.
            from agentspeed_engine.models.graphs import Graphs

            self._graphs = Graphs(
                joined(chain, self.plan, comm) if joins and source.family.joined_ops else None,
                self._steps,
                partial(_by_modules, self._steps, self._rope, page_tokens, self._workspace, self._attention),
                self.pools,
                info.vocab_size,
                self._rope,
                self._attention,
                self.device,
                agree=agree if comm is not None else None,
            )

    @property
    def repeats(self) -> bool:
        """Whether steps of few rows may be recorded, on a GPU captured, and repeated. Records and graphs are kept while
        it is False."""
        return self._programs.allowed

    @repeats.setter
    def repeats(self, allowed: bool) -> None:
        self._programs.allowed = allowed

    @property
    def graphs(self) -> int:
        """CUDA graphs that were captured."""
        return 0 if self._graphs is None else self._graphs.count

    @property
    def joins(self) -> bool:
        """Whether the graphs are of joined steps: those are wanted, and no check has found them wrong."""
        return self._graphs is not None and self._graphs.joins

    @torch.inference_mode()
    def capture(self, context_limit: int, most_new: int, progress: Callable[[int], None]) -> bool:
        """Captures graphs of the usual steps on a GPU, in contexts of up to `context_limit` tokens and with up to
        `most_new` of a prompt, so that no turn waits for it; False where memory ended before the list did. Call it
        before the first step."""
        if self._graphs is None:
            return True
        pool_tokens = self.pools.tensors[0].shape[1] * self.page_tokens
        return self._graphs.capture(context_limit, pool_tokens, most_new, progress)

    @torch.inference_mode()
    def forward(self, batch: FlatBatch, name: Callable[[Tensor], None] | None = None) -> Tensor:
        """Logits [S, ids of this rank] of the selected rows, on the model's device; the cache has the rows of all
        tokens afterwards. On a GPU both are so once its work is done; `forward` does not wait for it.

        `name` may put ids that are known there alone into the ids of the step [T] before they are read."""
        if len(batch.hidden) and self.device.type != "cpu":  # kernels of a CPU read no row that nobody sees
            self.pools.clear(unwaited(batch.hidden, self.device))
        if self._graphs is not None and self.repeats and (found := self._graphs.run(batch, name)) is not None:
            return found
        ids, state = step_state(batch, self._rope, self.page_tokens, self._workspace, self._attention)
        if name is not None:
            name(ids)
        repeated = self._programs.run(ids, state)
        if repeated is not None:
            return repeated
        logits: Tensor = run(self._steps, ids, state, batch.tokens_per_rank or (len(batch.ids),))
        return logits

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """The first `rows` rows of a page, in every layer."""
        self.pools.copy_rows(src_page, dst_page, rows)


def _adds_alike(device: torch.device) -> None:
    """Asks a GPU before the first turn, which would wait for compilers. Raises `EngineFault` (bad_options)."""
    # Imported late: only a GPU's kernels need it.
    from agentspeed_kernels.triton.invariant import alike

    if alike(device) == "none":
        raise EngineFault(
            "bad_options",
            "batch_invariant is asked for, and the products of this GPU have other bits for 16 rows than for 32.",
            "Leave batch_invariant out, or give device='cpu'.",
        )


def _by_modules(
    steps: Sequence[Compiled],
    rope: Rope,
    page_tokens: int,
    workspace: Workspace,
    backend: AttentionBackend,
    batch: FlatBatch,
) -> Tensor:
    """Logits of the selected rows, kernel by kernel."""
    ids, state = step_state(batch, rope, page_tokens, workspace, backend)
    logits: Tensor = run(steps, ids, state, (len(batch.ids),))
    return logits


def step_state(
    batch: FlatBatch,
    rope: Rope,
    page_tokens: int,
    workspace: Workspace,
    backend: AttentionBackend | None = None,
) -> tuple[Tensor, StepState]:
    """(Ids [T], state) on the device of the workspace. `backend` is that of its kernels; the CPU's when left out."""
    ids, positions, slots, select = upload(batch, workspace.device)
    cos, sin = rope.at(positions)
    backend = backend or CpuAttention(page_tokens)
    attention = backend.prepare(batch.runs, batch.positions)
    return ids, StepState(cos=cos, sin=sin, slots=slots, attention=attention, select=select, workspace=workspace)


def _attention(
    kernels: Kernels, ops: Sequence[str], sizes: dict[str, int], device: torch.device
) -> CpuAttention | TritonAttention:
    """The backend that prepares what the chosen kernels of attention take.

    Where those of rows and of long extends want different plans, every row runs as one of the former, as in a
    batch-invariant model; where an indexer chooses what is read, there are no long extends."""
    if "index_select" in ops:
        return CpuAttention(sizes["page_tokens"], NEVER)
    rows, extend = ("mla_rows", "mla_extend") if "mla_rows" in ops else ("gqa_rows", "gqa_extend")
    plans = kernels[rows].choice(1).kernel.plans
    long = kernels[extend].choice(UNBOUNDED).kernel if kernels.has(extend) else None
    extends = long is not None and long.plans == plans
    if plans == "tiles":
        cpu = CpuAttention(sizes["page_tokens"], invariant=kernels.invariant)
        if long is None or not extends:
            return replace(cpu, extend_from=NEVER)
        return cpu if long.extend_from is None else replace(cpu, extend_from=long.extend_from)
    # Imported late: only a GPU's kernels need it.
    from agentspeed_kernels.triton.backend import attention_of

    kept = 1 if kernels.cache == "fp8" else DTYPE_BYTES[kernels.dtype]
    found = attention_of(sizes, device, kept, invariant=kernels.invariant)
    return found if extends else replace(found, extend_from=NEVER)
