"""Grouped-query attention over the whole context, with dense or routed feed-forwards: Llama, Qwen2, Qwen3 and
Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from agentspeed_engine.models.families.grouped.config import (
    GroupedConfig,
    parse_llama,
    parse_qwen2,
    parse_qwen3,
    parse_qwen3_moe,
)
from agentspeed_engine.models.families.grouped.shapes import OPS, cuts, kv_layout, shapes, sizes
from agentspeed_engine.models.family import Family
from agentspeed_engine.models.fields import Fields

if TYPE_CHECKING:
    from agentspeed_engine.models.kv_pools import KvPools
    from agentspeed_engine.models.state import StepState
    from agentspeed_engine.models.weights import WeightSource
    from agentspeed_engine.spmd.lower import Module
    from agentspeed_engine.spmd.placement import Rank
    from agentspeed_kernels.selection import Kernels


def _build(
    config: GroupedConfig, weights: WeightSource, pools: KvPools, rank: Rank, kernels: Kernels
) -> list[Module[StepState]]:
    # Imported late: describing a model loads no tensors.
    from agentspeed_engine.models.families.grouped.build import build

    return build(config, weights, pools, rank, kernels)


def _family(
    name: str, model_type: str, parse: Callable[[Fields], GroupedConfig], more_joined: tuple[str, ...] = ()
) -> Family[GroupedConfig]:
    return Family(
        name=name,
        attention="grouped-query attention",
        model_types=(model_type,),
        parse=parse,
        shapes=shapes,
        cuts=cuts,
        kv_layout=kv_layout,
        ops=OPS,
        joined_ops=("add_norm_linear", *more_joined),
        sizes=sizes,
        build=_build,
    )


FAMILIES: tuple[Family[GroupedConfig], ...] = (
    _family("Llama", "llama", parse_llama),
    _family("Qwen2", "qwen2", parse_qwen2),
    _family("Qwen3", "qwen3", parse_qwen3),
    _family("Qwen3-MoE", "qwen3_moe", parse_qwen3_moe, ("add_norm_route",)),
)
