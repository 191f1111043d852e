"""Plans a model on a mesh of ranks from its configuration alone: its modules are built and called without memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast, final

import torch
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.held_weights import held_by
from agentspeed_engine.models.kv_layout import DTYPE_BYTES
from agentspeed_engine.models.kv_pools import TORCH_DTYPES, KvPools
from agentspeed_engine.models.mesh_fit import check_mesh
from agentspeed_engine.models.source import Dtype, ModelSource
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weights import MetaWeights
from agentspeed_engine.spmd.exchange import Routed
from agentspeed_engine.spmd.legality import check_plan
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.machine import MeshChoice
from agentspeed_engine.spmd.placement import AXES, Axis, Mesh, Owners
from agentspeed_engine.spmd.plan import PlanError, fuse, plan
from agentspeed_engine.spmd.report import AxisLimit, ModelPlan, Room, StepLine, room_in, step_lines
from agentspeed_engine.spmd.spec import TOKEN_SHARD
from agentspeed_kernels.attention import AttentionStep
from agentspeed_kernels.fp8_blocks import BLOCK, Fp8Blocks
from agentspeed_kernels.ops import BYTE_OPS
from agentspeed_kernels.packing import Weight, side_by_side
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.workspace import Workspace

_EXPERT = re.compile(r"\.experts\.\d+\.")
_EMBEDDING = "model.embed_tokens.weight"
_MOST_RANKS = 1 << 16
"""Where looking for a cut that fails ends."""


def plan_model(
    source: ModelSource,
    mesh: Mesh,
    *,
    dtype: Dtype,
    rows: int,
    page_tokens: int = 64,
    memory: int | None = None,
    session_tokens: int | None = None,
    choice: MeshChoice | None = None,
    weights: Literal["fp8"] | None = None,
    cache: CacheFormat | None = None,
) -> ModelPlan:
    """No weight is read. `rows`: tokens of each dp rank in the step that is described. `memory`: bytes of one GPU.
    `choice` is handed on as it is. `weights`: format of the matrices, `cache`: of the KV cache; None: `dtype`.

    Raises `EngineFault`: bad_config for a mesh that does not divide the model, bad_options for a context above the
    model's, unsupported_model for sparse attention.
    """
    family, config = source.family, source.config
    if "index_select" in family.ops:
        raise EngineFault("unsupported_model", f"Nobody has planned {family.attention} ({family.name}) on several "
                          "ranks yet.", "An engine runs it there all the same.")  # fmt: skip
    if session_tokens is not None and session_tokens > config.context_limit:
        raise EngineFault("bad_options", f"A session of {session_tokens} tokens is longer than the model's context "
                          f"of {config.context_limit}.", "Ask for a shorter one.")  # fmt: skip
    check_mesh(source, mesh)
    shapes = dict(family.shapes(config))
    kv = family.kv_layout(config, cache or dtype, mesh)
    kernels = cast(Kernels, _NoKernels(dtype, weights))
    weights_by_name = MetaWeights(shapes, TORCH_DTYPES[dtype])
    chain = family.build(config, weights_by_name, KvPools(kv, 1, page_tokens), mesh.rank(0), kernels)
    boundaries = [module.boundary for module in chain]
    try:
        made = fuse(plan(boundaries, mesh, start=TOKEN_SHARD, finish=TOKEN_SHARD), boundaries)
        check_plan(made, boundaries, start=TOKEN_SHARD, finish=TOKEN_SHARD)
    except PlanError as error:
        raise EngineFault("bad_config", str(error), "") from error
    item = DTYPE_BYTES[dtype]
    lines = step_lines(made, boundaries, rows=rows, start=TOKEN_SHARD, item_bytes=item)
    held, workspace = _weight_bytes(chain), _workspace_bytes(chain, lines, TORCH_DTYPES[dtype])
    room: Room | None = None
    if memory is not None:
        room = room_in(
            memory,
            weights=held,
            workspace=workspace,
            bytes_per_token=kv.bytes_per_token,
            page_tokens=page_tokens,
            limit=config.context_limit,
            session_tokens=session_tokens,
            dp=mesh.dp,
        )
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return ModelPlan(
        model_type=config.model_type,
        dtype=dtype,
        weights=weights,
        cache=cache,
        tp=mesh.tp,
        dp=mesh.dp,
        experts=config.moe.experts if config.moe is not None else 0,
        ep=mesh.expert_groups if config.moe is not None else 1,
        exchange=mesh.exchange,
        spare_experts=mesh.experts.spare,
        rows=rows,
        parameters=parameters,
        active_parameters=_active(source, shapes),
        context_limit=config.context_limit,
        weight_bytes=held,
        cache_bytes_per_token=kv.bytes_per_token,
        workspace_bytes=workspace,
        steps=lines,
        bytes_per_token=sum(line.bytes_sent for line in lines) // (rows * mesh.dp),
        launches=sum(line.launches for line in lines),
        limits=tuple(_limit(source, mesh, axis) for axis in AXES),
        fused=made.fused,
        room=room,
        choice=choice,
    )


def _active(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> int:
    """What a token is multiplied with: a table of embeddings only where it is the head as well."""
    moe = source.config.moe
    routed = sum(math.prod(shape) for name, shape in shapes.items() if _EXPERT.search(name))
    table = 0 if "lm_head.weight" not in shapes else math.prod(shapes[_EMBEDDING])
    resting = routed - routed * moe.top // moe.experts if moe is not None else 0
    return sum(math.prod(shape) for shape in shapes.values()) - table - resting


def _limit(source: ModelSource, mesh: Mesh, axis: Axis) -> AxisLimit:
    """Doubles one axis until the model does not divide any more."""
    fits, extent = mesh.extent(axis), 2 * mesh.extent(axis)
    while extent <= _MOST_RANKS:
        larger = replace(mesh, dp=extent) if axis == "dp" else replace(mesh, tp=extent)
        try:
            check_mesh(source, larger)
        except EngineFault as fault:
            return AxisLimit(axis=axis, most=fits, fails_at=extent, reason=fault.message)
        fits, extent = extent, 2 * extent
    return AxisLimit(axis=axis, most=fits, fails_at=0, reason=f"nothing of the model is cut over {axis}")


def _weight_bytes(chain: list[Module[StepState]]) -> int:
    """Of what the modules hold, each tensor once: a tied head is the embedding."""
    weights = (held for held in held_by(chain) if not isinstance(held, Tensor) or held.is_meta)
    return sum({id(held): held.nbytes for held in weights}.values())


def _workspace_bytes(chain: list[Module[StepState]], lines: tuple[StepLine, ...], dtype: torch.dtype) -> int:
    """Calls every module with a value of the shape that the plan gives it; raises where it gives another one back."""
    workspace = _Measured()
    rows = lines[0].before[0]
    angles = torch.empty(rows, 1, device="meta")
    # Attention kernels that compute nothing look at no tiles.
    state = StepState(
        cos=angles,
        sin=angles,
        slots=torch.empty(rows, dtype=torch.int64, device="meta"),
        attention=AttentionStep(few=object(), many=None, many_rows=torch.empty(0, dtype=torch.int64)),
        select=torch.arange(rows),
        workspace=cast(Workspace, workspace),
    )
    calls = (module for module in chain)
    residual: Tensor | None = None
    out: Any = None
    for line in lines:
        if line.kind != "call":
            continue
        module = next(calls)
        ids = len(line.before) == 1
        x: Any = torch.empty(line.before, dtype=torch.int64 if ids else dtype, device="meta")
        if isinstance(out, Routed) and isinstance(module.boundary.input.dp, Owners):
            x = _arrived(out, x)
        out, residual = module(x, residual, state)
        given = tuple((out.x if isinstance(out, Routed) else out).shape)
        if given != line.after:
            raise PlanError(f"{line.name} gives {given} and declares {line.after}")
    return workspace.bytes


def _arrived(routed: Routed, rows: Tensor) -> Routed:
    """As many rows as are expected, all of whose choices lie on this rank."""
    top = routed.places.shape[1]
    places = torch.zeros(rows.shape[0], top, dtype=torch.int64)
    return replace(routed, x=rows, places=places, weights=torch.ones(rows.shape[0], top), counts=(rows.shape[0],))


@final
class _Measured:
    """A workspace that only keeps how large its buffers would be."""

    def __init__(self) -> None:
        self._most: dict[tuple[str, torch.dtype], int] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = (name, dtype)
        self._most[key] = max(self._most.get(key, 0), math.prod(shape))
        return torch.empty(shape, dtype=dtype, device="meta")

    def constant(self, value: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `Workspace.constant`."""
        return self.take(f"constant_{value}", shape, dtype)

    @property
    def bytes(self) -> int:
        return sum(count * dtype.itemsize for (_, dtype), count in self._most.items())


@final
class _NoKernels:
    """Stands in for `Kernels`: weights stay rows, and nothing is computed."""

    def __init__(self, dtype: Dtype, weights: Literal["fp8"] | None) -> None:
        self.dtype, self.weights = dtype, weights
        self.kept = TORCH_DTYPES[dtype]
        self._ops = {"route": _Op(_route), "experts": _Op(_experts)}

    def __getitem__(self, op: str) -> _Op:
        return self._ops.get(op, _NOTHING)

    @property
    def head(self) -> _Op:
        return _NOTHING

    def has(self, op: str) -> bool:
        del op
        return False

    def weight(self, held: Tensor, parts: int = 1, op: str = "linear") -> Tensor | Fp8Blocks:
        return _in_blocks(held, parts) if self.weights is not None and op in BYTE_OPS else held

    def experts(self, count: int, *parts: Callable[[int], Tensor]) -> Tensor | Fp8Blocks:
        whole = side_by_side(count, parts)
        return whole if self.weights is None else _in_blocks(whole, len(parts))

    def copy(self, x: Tensor, out: Tensor) -> None:
        del x, out

    def add(self, x: Tensor, total: Tensor) -> None:
        del x, total

    def own(self, ids: Tensor, weights: Tensor, first: int, held: int) -> None:
        del ids, weights, first, held


@final
class _Op:
    def __init__(self, call: Any) -> None:
        self._call = call

    def at(self, rows: int) -> Any:
        del rows
        return self._call


def _nothing(*_: object) -> None:
    """Leaves its output as it is."""


def _route(x: Tensor, router: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Every expert as often as any other. Not without memory, for a router sends rows by what it finds here."""
    del bias
    rows, experts = x.shape[0], router.shape[0]
    return torch.arange(rows * rule.top).view(rows, rule.top) % experts, torch.ones(rows, rule.top)


def _in_blocks(held: Tensor, parts: int) -> Fp8Blocks:
    """As `fp8_blocks.in_blocks`, without looking at anything."""
    *front, outputs, inputs = held.shape
    front, outputs = (front, outputs) if parts == 1 else ([*front, parts], outputs // parts)
    data = torch.empty(*front, outputs, inputs, dtype=torch.float8_e4m3fn, device=held.device)
    return Fp8Blocks(data, torch.empty(*front, -(-outputs // BLOCK), -(-inputs // BLOCK), device=held.device))


def _experts(
    x: Tensor, gate_up: Weight, down: Weight, ids: Tensor, weights: Tensor, workspace: _Measured, out: Tensor
) -> None:
    """What lies between its two products is taken by every form of the op, at most one row for each choice."""
    del down, weights, out
    inner = gate_up.shape[1] if isinstance(gate_up, Tensor) else 2 * gate_up.shape[-2]
    workspace.take("planned_gate_up", (ids.numel(), inner), x.dtype)


_NOTHING = _Op(_nothing)
