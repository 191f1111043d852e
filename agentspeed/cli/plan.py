"""What `agentspeed plan` prints: a model on several ranks, its steps, what they send, and what the memory holds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.cli.engine_flags import CacheWord
from agentspeed.transport.model_plans import Candidate, MeshChoice, ModelPlan, PlanRequest, StepLine, planned

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def described(
    model: Path,
    *,
    weights: Literal["dtype", "fp8"] | None,
    kv_cache_dtype: CacheWord | None,
    exchange: Literal["auto", "sum", "all_to_all"],
    memory: str | None,
    as_json: bool,
    **given: Any,
) -> str:
    """Text for people, or one JSON object; `given` are fields of `PlanRequest`. Raises what `planned` raises, and
    `InvalidRequest` for what is no size of a memory."""
    request = PlanRequest(
        weights=None if weights == "dtype" else weights,
        cache=None if kv_cache_dtype == "dtype" else kv_cache_dtype,
        exchange=None if exchange == "auto" else exchange,
        memory=None if memory is None else memory_bytes(memory),
        **given,
    )
    plan = planned(model, request)
    return json.dumps(dataclasses.asdict(plan)) if as_json else text(plan)


def memory_bytes(given: str) -> int:
    """Of "141GB", "80GiB" or a number of bytes. Raises `InvalidRequest`."""
    match = _SIZE.fullmatch(given.strip())
    if match is None:
        raise errors.InvalidRequest(f"{given!r} is no size of a memory.", remedy="Write it as 141GB or 80GiB.")
    number, unit = match[1], (match[2] or "").upper()
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    size = int(float(number) * (1024 if unit.endswith("I") else 1000) ** power)
    if size < 1:
        raise errors.InvalidRequest("A memory of no bytes holds nothing.", remedy="Write it as 141GB or 80GiB.")
    return size


def text(plan: ModelPlan) -> str:
    """One fact a line; layers that are alike are shown once."""
    ranks = plan.tp * plan.dp
    lines = [
        f"{plan.model_type} on {counted(ranks, 'rank')}: tp {plan.tp}, dp {plan.dp}, {plan.dtype}"
        + (f", matrices in {plan.weights}" if plan.weights else "")
        + (f", cache in {plan.cache}" if plan.cache else ""),
        *_experts(plan),
        f"parameters     {plan.parameters / 1e9:.1f} B, of which a token is multiplied with "
        f"{plan.active_parameters / 1e9:.1f} B",
        "",
        "on each GPU",
        f"  weights      {_size(plan.weight_bytes)}",
        f"  cache        {plan.cache_bytes_per_token:,} B a token",
        f"  workspace    {_size(plan.workspace_bytes)} between kernels, in a step of {counted(plan.rows, 'row')}",
        *_room(plan),
        "",
        "collectives of one step",
        f"  launches     {plan.launches}",
        f"  each sends   {plan.bytes_per_token:,} B a token",
        *_kinds(plan),
        f"  fused        {plan.fused} all-reduces, with the addition to the residual and the norm behind them",
        "",
        "where the next cut fails",
        *(f"  {line}" for line in _limits(plan)),
        "",
        *(_choice(plan.choice) if plan.choice is not None else ()),
        f"steps on one rank, {counted(plan.rows, 'row')} a dp rank",
        *_steps(plan.steps),
    ]
    return "\n".join(lines)


def _room(plan: ModelPlan) -> Iterator[str]:
    room = plan.room
    if room is None:
        yield "  for contexts and sessions give --memory"
        return
    if not room.tokens:
        yield f"  of {_size(room.memory)}: {_size(-room.cache)} too little for the weights, or no page fits. Add ranks."
        return
    yield f"  of {_size(room.memory)}: {_size(room.cache)} for the cache, {room.tokens:,} tokens in whole pages"
    why = "the model's own limit" if room.largest_context == plan.context_limit else "what fits"
    yield f"  largest context of a session: {room.largest_context:,} ({why})"
    yield f"  sessions of {room.session_tokens:,} tokens: {room.sessions:,}" + (
        f" on all {plan.dp} dp ranks" if plan.dp > 1 else ""
    )


def _experts(plan: ModelPlan) -> Iterator[str]:
    if not plan.experts:
        return
    spare = f", {plan.spare_experts} of them copies" if plan.spare_experts else ""
    way = "rows are sent to them" if plan.exchange == "all_to_all" else "given every row, and summed"
    yield f"experts        {plan.experts + plan.spare_experts}{spare}, over {counted(plan.ep, 'group')} of ranks; {way}"


def _kinds(plan: ModelPlan) -> Iterator[str]:
    """Collectives of one kind along one axis, together."""
    tokens = plan.rows * plan.dp
    found: dict[str, list[StepLine]] = {}
    for line in plan.collectives:
        found.setdefault(f"{line.kind} over {line.axis}", []).append(line)
    for name, lines in found.items():
        launches, sent = sum(line.launches for line in lines), sum(line.bytes_sent for line in lines)
        yield f"    {name:24} {len(lines):4}, {launches:4} launches, {sent // tokens:>12,} B a token"


def _choice(choice: MeshChoice) -> Iterator[str]:
    """By the cost model: the best first, then why others cannot be."""
    machine = choice.machine
    yield (
        f"meshes of {machine.gpus} {machine.name}, for {counted(choice.wanted_sessions, 'session')} of "
        f"{choice.context:,} tokens (by the cost model, not measured)"
    )
    yield from (f"  {_candidate(one)}" for one in choice.candidates)
    yield ""


def _candidate(one: Candidate) -> str:
    name = f"tp {one.tp:<3} dp {one.dp:<3} {one.exchange:10}"
    if one.refused:
        return f"{name} cannot be: {one.refused}"
    return (
        f"{name} {one.tokens_per_second:9,.0f} tokens/s, {one.sessions:,} sessions, {1000 * one.step_seconds:.1f} ms a "
        f"step, {one.sent_share:.0%} of it sending, weights {_size(one.weight_bytes)}"
    )


def _limits(plan: ModelPlan) -> Iterator[str]:
    for limit in plan.limits:
        if limit.fails_at:
            yield f"{limit.axis} goes to {limit.most}; at {limit.fails_at}: {limit.reason}"
        else:
            yield f"{limit.axis} goes on: {limit.reason}"


def _steps(steps: Sequence[StepLine]) -> Iterator[str]:
    """A layer is what lies between two names of other layers; equal ones in a row are one."""
    layers = [
        (layer, [_step(line) for line in lines]) for layer, lines in groupby(steps, lambda line: _layer(line.name))
    ]
    for shown, alike in groupby(layers, lambda item: (item[0] is None, item[1])):
        numbers = [layer for layer, _ in alike]
        if not shown[0]:
            span = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}, each"
            yield f"  {span}"
        yield from ("  " + ("" if shown[0] else "  ") + line for line in shown[1])


def _layer(name: str) -> int | None:
    """Of a collective between two layers: the first, whose output it moves."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _step(line: StepLine) -> str:
    name = _LAYER.sub("", line.name)
    shape = f"{list(line.before)} > {list(line.after)}"
    if line.kind == "call":
        return f"{name:44} {shape}"
    value = "" if line.value == "x" else f" of the {line.value}"
    fused = ", fused with the next" if line.fused else ""
    return f"{line.kind + ' over ' + str(line.axis) + value:44} {shape}  {line.bytes_sent:,} B sent{fused}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.1f} MB"
