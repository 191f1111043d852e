"""Chooses a mesh and a way to the experts by a cost model, from a configuration alone: no module is built."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.boundaries import outline
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.mesh_fit import check_mesh
from agentspeed_engine.models.pieces import part_of
from agentspeed_engine.models.source import Dtype, ModelSource
from agentspeed_engine.models.tensor_shapes import Shape
from agentspeed_engine.models.weight_formats import WeightFormat, tensor_bytes
from agentspeed_engine.spmd.experts import Exchange, ExpertSpread
from agentspeed_engine.spmd.machine import Candidate, Machine, MeshChoice
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import plan
from agentspeed_engine.spmd.report import room_in, step_lines
from agentspeed_engine.spmd.spec import TOKEN_SHARD
from agentspeed_kernels.signature import CacheFormat

_NUMBER = re.compile(r"\d+")
_ROUTED = re.compile(r"\.experts\.0\.")
_WIDE = re.compile(r"\.mlp\.gate\.")
"""Of the router, which keeps at least float32."""
EXCHANGES: tuple[Exchange, ...] = ("sum", "all_to_all")


@final
class Weights:
    """The elements of all tensors by kind: those of other layers and other experts are of one kind."""

    __slots__ = ("_kinds", "_shapes", "_source", "_tied", "_weights")

    def __init__(self, source: ModelSource, weights: WeightFormat | None = None) -> None:
        """`weights`: the matrices' format; None: that of all."""
        self._source = source
        self._weights: WeightFormat | None = weights
        self._kinds: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        for name, shape in source.family.shapes(source.config):
            kind = _NUMBER.sub("0", name)
            self._kinds[kind] = self._kinds.get(kind, 0) + math.prod(shape)
            self._shapes[kind] = shape  # those of a kind are alike
        self._tied = "lm_head.weight" not in self._kinds

    def routed(self, mesh: Mesh) -> int:
        """Elements of routed experts on one rank, spare copies with them."""
        moe = self._source.config.moe
        if moe is None:
            return 0
        whole = sum(count for kind, count in self._kinds.items() if _ROUTED.search(kind))
        each = (moe.experts + mesh.experts.spare) // mesh.expert_groups
        return whole // moe.experts * each // (mesh.size // mesh.expert_groups)

    def others(self, mesh: Mesh) -> dict[str, int]:
        """Elements of everything else on one rank, by kind."""
        found: dict[str, int] = {}
        for kind, count in self._kinds.items():
            if not _ROUTED.search(kind):
                part = part_of(kind, mesh.rank(0))
                found[kind] = count // part.count if part is not None else count
        return found

    def bytes(self, mesh: Mesh, dtype: Dtype) -> int:
        """Of one rank."""
        others = self.others(mesh)
        return sum(self.taken(kind, count, mesh, dtype) for kind, count in others.items()) + self.experts(mesh, dtype)

    def experts(self, mesh: Mesh, dtype: Dtype) -> int:
        """Bytes of the routed experts of one rank."""
        kinds = [kind for kind in self._kinds if _ROUTED.search(kind)]
        return sum(self.taken(kind, self.routed(mesh) // len(kinds), mesh, dtype) for kind in kinds)

    def taken(self, kind: str, count: int, mesh: Mesh, dtype: Dtype) -> int:
        """Bytes of `count` elements of a kind, in whole pieces as one rank has them."""
        item = max(4, DTYPE_BYTES[dtype]) if _WIDE.search(kind) else DTYPE_BYTES[dtype]
        part, shape = part_of(kind, mesh.rank(0)), self._shapes[kind]
        piece = tuple(
            extent // part.count if part is not None and dim == part.dim else extent for dim, extent in enumerate(shape)
        )
        return count // math.prod(piece) * tensor_bytes(kind, piece, item, self._weights, tied=self._tied)


def choose_mesh(
    source: ModelSource,
    machine: Machine,
    *,
    dtype: Dtype,
    context: int,
    sessions: int,
    page_tokens: int = 64,
    spread: ExpertSpread | None = None,
    kept: WeightFormat | None = None,
    cache: CacheFormat | None = None,
) -> MeshChoice:
    """Every mesh of all GPUs, and both ways to the experts where there are two. The best answers most tokens a second
    with `sessions` sessions of `context` tokens, or as many of them as fit. `spread`: groups and spare copies; `kept`:
    the matrices' format, `cache`: that of the KV cache, None: `dtype`."""
    spread = spread or ExpertSpread()
    weights = Weights(source, kept)
    found: list[Candidate] = []
    for tp in range(1, machine.gpus + 1):
        if machine.gpus % tp:
            continue
        mesh = Mesh(dp=machine.gpus // tp, tp=tp, experts=spread)
        ways = EXCHANGES if source.config.moe is not None and mesh.dp > 1 else EXCHANGES[:1]
        for way in ways:
            asked = replace(mesh, experts=replace(spread, exchange=way))
            found.append(_candidate(source, weights, asked, machine, dtype, context, sessions, page_tokens,
                                    cache))  # fmt: skip
    found.sort(key=lambda one: (bool(one.refused), -one.tokens_per_second, one.tp))
    return MeshChoice(machine=machine, context=context, wanted_sessions=sessions, candidates=tuple(found))


def cheaper_exchange(source: ModelSource, mesh: Mesh, machine: Machine, *, dtype: Dtype, rows: int) -> Exchange:
    """The way to the experts that a step of `rows` rows a dp rank sends less for, by seconds on the machine's links.
    Where only one of them divides the model, that one."""
    if source.config.moe is None or mesh.dp == 1:
        return "sum"
    seconds: dict[Exchange, float] = {}
    for way in EXCHANGES:
        asked = replace(mesh, experts=replace(mesh.experts, exchange=way))
        try:
            check_mesh(source, asked)
        except EngineFault:
            continue
        sent, launches = _sent(source, asked, dtype, rows)
        seconds[way] = sent / machine.link + launches * machine.launch
    return min(seconds, key=lambda way: seconds[way]) if seconds else "sum"


def _sent(source: ModelSource, mesh: Mesh, dtype: Dtype, rows: int) -> tuple[int, int]:
    """(Bytes that each rank sends, launches) in a step of `rows` rows a dp rank."""
    chain = outline(source.config, mesh)
    made = plan(chain, mesh, start=TOKEN_SHARD, finish=TOKEN_SHARD)
    lines = step_lines(made, chain, rows=rows, start=TOKEN_SHARD, item_bytes=DTYPE_BYTES[dtype])
    return sum(line.bytes_sent for line in lines), sum(line.launches for line in lines)


def _candidate(
    source: ModelSource, weights: Weights, mesh: Mesh, machine: Machine, dtype: Dtype, context: int, sessions: int,
    page_tokens: int, cache: CacheFormat | None,
) -> Candidate:  # fmt: skip
    def made(refused: str, held: int = 0, fits: int = 0, seconds: float = 0.0, share: float = 0.0) -> Candidate:
        return Candidate(
            tp=mesh.tp,
            dp=mesh.dp,
            ep=mesh.expert_groups if source.config.moe is not None else 1,
            exchange=mesh.exchange,
            refused=refused,
            weight_bytes=held,
            sessions=fits,
            step_seconds=seconds,
            sent_share=share,
        )

    try:
        check_mesh(source, mesh)
    except EngineFault as fault:
        return made(fault.message)
    held = weights.bytes(mesh, dtype)
    row_bytes = source.family.kv_layout(source.config, cache or dtype, mesh).bytes_per_token
    room = room_in(
        machine.memory,
        weights=held,
        workspace=0,
        bytes_per_token=row_bytes,
        page_tokens=page_tokens,
        limit=source.config.context_limit,
        session_tokens=context,
        dp=mesh.dp,
    )
    fits = min(sessions, room.sessions)
    if not fits:
        return made(f"no session of {context} tokens fits beside weights of {held / 1e9:.1f} GB", held)
    rows = math.ceil(fits / mesh.dp)
    read, flops = _work(source, weights, mesh, dtype, rows)
    sent, launches = _sent(source, mesh, dtype, rows)
    read += rows * context * row_bytes
    seconds = machine.seconds(read=read, flops=flops, sent=sent, launches=launches)
    alone = machine.seconds(read=read, flops=flops, sent=0, launches=0)
    return made("", held, fits, seconds, 1 - alone / seconds)


def _work(source: ModelSource, weights: Weights, mesh: Mesh, dtype: Dtype, rows: int) -> tuple[float, float]:
    """(Bytes of weights that a rank reads, FLOPs of its products with them) in a step of `rows` rows a dp rank. Of the
    routed experts those that at least one row chose are read, were every choice alike likely."""
    moe, others = source.config.moe, weights.others(mesh)
    if "lm_head.weight" in others:  # else the table of embeddings is the head as well
        others["model.embed_tokens.weight"] = 0
    fixed, read = sum(others.values()), sum(weights.taken(*one, mesh, dtype) for one in others.items())
    if moe is None:
        return read, 2.0 * fixed * rows
    visited = moe.top / moe.experts
    routed, everybody = weights.routed(mesh), rows * mesh.dp
    touched = 1 - (1 - visited) ** everybody
    return read + weights.experts(mesh, dtype) * touched, 2.0 * (fixed * rows + routed * visited * everybody)
