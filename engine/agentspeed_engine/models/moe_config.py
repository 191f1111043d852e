"""What a configuration says of routed experts, the same for every family that has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.fields import Fields
from agentspeed_engine.models.tensor_shapes import Cut, Shape
from agentspeed_engine.spmd.experts import share_of_rows
from agentspeed_engine.spmd.placement import Mesh, Owners
from agentspeed_engine.wording import counted

_MOST_EXPERTS = 2**17
"""Of all layers together (DeepSeek-V3: 61 of 256, 15,616): every tensor is looked for by its name, which takes time."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The experts of every routed layer."""

    experts: int
    top: int
    inner: int
    """Of one expert."""
    shared: int
    """Experts that every token visits, as one of `shared` times the width; 0 where there are none."""
    layers: frozenset[int]
    """Those that have experts; the others are dense."""
    groups: int
    top_groups: int
    score: Literal["sigmoid", "softmax"]
    group_score: Literal["top2", "max"]
    normalise: bool
    scale: float
    corrected: bool
    """Choices are made by scores plus a bias per expert that the checkpoint holds."""


def experts_of(moe: MoeConfig | None, layer: int) -> MoeConfig | None:
    """None for a layer with one feed-forward instead of experts."""
    return moe if moe is not None and layer in moe.layers else None


def check_experts(fields: Fields, moe: MoeConfig, layers: int, name: str) -> None:
    """`name` is the family's field that counts experts. Raises `EngineFault` (bad_config)."""
    fields.require(
        layers * moe.experts <= _MOST_EXPERTS,
        f"num_hidden_layers times {name} is {layers * moe.experts}",
        f"It must be at most {_MOST_EXPERTS}.",
    )
    fields.require(
        moe.experts % moe.groups == 0,
        f"{name} {moe.experts} does not divide into n_group {moe.groups}",
        "Correct n_group.",
    )
    fields.require(
        moe.top_groups <= moe.groups, f"topk_group {moe.top_groups} is above n_group {moe.groups}", "Lower topk_group."
    )
    reachable = moe.experts // moe.groups * moe.top_groups
    fields.require(
        moe.top <= reachable,
        f"num_experts_per_tok {moe.top} is above the {counted(reachable, 'expert')} of topk_group groups",
        "Raise topk_group, or lower num_experts_per_tok.",
    )
    fields.require(
        moe.group_score == "max" or moe.experts // moe.groups >= 2,
        f"a group of {counted(moe.experts // moe.groups, 'expert')} has no top 2",
        "Lower n_group.",
    )


def expert_cuts(moe: MoeConfig, mesh: Mesh, name: str) -> list[Cut]:
    """What a mesh must divide of the experts; `name` is the family's field that counts them. Raises `EngineFault`
    (bad_config) for groups and spare copies that no mesh like it can have."""
    spread, groups = mesh.experts, mesh.expert_groups
    if mesh.size % groups:
        raise EngineFault(
            "bad_config",
            f"{counted(mesh.size, 'rank')} cannot make {groups} equal groups of experts.",
            "Choose an ep that divides dp * tp.",
        )
    if spread.spare > moe.experts * (groups - 1):
        raise EngineFault(
            "bad_config",
            f"{spread.spare} spare experts are more than one copy of each on every other of {groups} groups.",
            "Ask for fewer.",
        )
    if spread.loads and len(spread.loads) != moe.experts:
        raise EngineFault(
            "bad_config",
            f"There are loads of {counted(len(spread.loads), 'expert')}, the model has {moe.experts}.",
            "Give one each.",
        )
    spare = f" + {spread.spare} spare =" if spread.spare else ""
    found: list[Cut] = [(name + spare, moe.experts + spread.spare, groups)]
    if mesh.size > groups:
        found.append(("moe_intermediate_size", moe.inner, mesh.size // groups))
    if moe.shared:
        ranks = mesh.tp if mesh.exchange == "all_to_all" else mesh.size
        found.append(("moe_intermediate_size * n_shared_experts", moe.inner * moe.shared, ranks))
    return found


def owners(moe: MoeConfig, mesh: Mesh) -> Owners:
    """What an exchange of rows along dp comes to. Eight bytes tell of a choice: an int32 place and a float32 weight."""
    return Owners(share=share_of_rows(moe.experts, moe.top, mesh.expert_groups), extra=8 * moe.top)


def expert_shapes(moe: MoeConfig, hidden: int, at: str) -> Iterator[tuple[str, Shape]]:
    """Router, experts and shared experts of one layer, whose names begin with `at`."""
    yield at + "gate.weight", (moe.experts, hidden)
    if moe.corrected:
        yield at + "gate.e_score_correction_bias", (moe.experts,)
    for expert in range(moe.experts):
        yield from feed_forward_shapes(f"{at}experts.{expert}.", hidden, moe.inner)
    if moe.shared:
        yield from feed_forward_shapes(at + "shared_experts.", hidden, moe.inner * moe.shared)


def feed_forward_shapes(at: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    """The three matrices of one SwiGLU."""
    yield at + "gate_proj.weight", (inner, hidden)
    yield at + "up_proj.weight", (inner, hidden)
    yield at + "down_proj.weight", (hidden, inner)
