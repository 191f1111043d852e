"""Multi-head latent attention, dense and sparse: DeepSeek-V2, V3 and V3.2, Kimi K2, GLM-4.7-Flash, GLM-5, Youtu."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from agentspeed_engine.models.families.deepseek.config import (
    DeepseekConfig,
    parse_glm,
    parse_v2,
    parse_v3,
    parse_youtu,
    text_of_kimi,
)
from agentspeed_engine.models.families.deepseek.shapes import (
    JOINED_OPS,
    OPS,
    SPARSE_OPS,
    cuts,
    kv_layout,
    shapes,
    sizes,
)
from agentspeed_engine.models.families.deepseek.sparse_config import parse_glm as parse_glm_dsa
from agentspeed_engine.models.families.deepseek.sparse_config import parse_v32
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
    config: DeepseekConfig, weights: WeightSource, pools: KvPools, rank: Rank, kernels: Kernels
) -> list[Module[StepState]]:
    # Imported late: describing a model loads no tensors.
    from agentspeed_engine.models.families.deepseek.build import build

    return build(config, weights, pools, rank, kernels)


def _family(
    name: str,
    model_types: tuple[str, ...],
    parse: Callable[[Fields], DeepseekConfig],
    *,
    sparse: bool = False,
) -> Family[DeepseekConfig]:
    return Family(
        name=name,
        attention=f"{'sparse ' if sparse else ''}multi-head latent attention",
        model_types=model_types,
        parse=parse,
        shapes=shapes,
        cuts=cuts,
        kv_layout=kv_layout,
        ops=SPARSE_OPS if sparse else OPS,
        joined_ops=() if sparse else JOINED_OPS,
        sizes=sizes,
        build=_build,
    )


FAMILIES: tuple[Family[DeepseekConfig], ...] = (
    _family("DeepSeek-V2", ("deepseek_v2",), parse_v2),
    _family("DeepSeek-V3, R1, Kimi K2, Moonlight and GigaChat3", ("deepseek_v3", "kimi_k2"), parse_v3),
    replace(
        _family("Kimi K2.5", ("kimi_k25",), parse_v3),
        text_part=text_of_kimi,
        prefix="language_model.",
        unread=re.compile(r"^(vision_tower|mm_projector)\."),
        notice="Its vision tower is left unread: it takes text only.",
    ),
    _family("GLM-4.7-Flash", ("glm4_moe_lite",), parse_glm),
    _family("Youtu", ("youtu", "youtu_llm"), parse_youtu),
    _family("DeepSeek-V3.2", ("deepseek_v32",), parse_v32, sparse=True),
    _family("GLM-5", ("glm_moe_dsa",), parse_glm_dsa, sparse=True),
)
