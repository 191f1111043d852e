"""What ops that join others mean: the others, one after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.reference.definitions import add_rms_norm, experts, heads_linear, latent_append, rope, route
from agentspeed_kernels.routing import RouteRule


def mla_queries(
    q: Tensor,
    raw: Tensor,
    gain: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_up: Tensor,
    pool: Tensor,
) -> tuple[Tensor, Tensor]:
    """(queries in the latent space with their turned rope parts, the pool after the rows are written)"""
    nope = key_up.shape[2]
    absorbed = heads_linear(q[:, :, :nope], key_up)
    turned = rope(q[:, :, nope:], cos, sin)
    return torch.cat([absorbed, turned], dim=-1), latent_append(raw, gain, eps, cos, sin, slots, pool)


def add_norm_route(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouteRule,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(expert ids, their weights, the norm, the sum)"""
    normed, total = add_rms_norm(x, residual, gain, eps)
    ids, weights = route(normed, weight, bias, rule)
    nobody = (slots < 0).unsqueeze(1)
    ids, weights = ids.masked_fill(nobody, weight.shape[0]), weights.masked_fill(nobody, 0.0)
    return ids, weights, normed, total


def experts_and_shared(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
) -> Tensor:
    """The routed experts' weighted sum and the shared expert's."""
    everyone = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    shared = experts(x, shared_gate_up, shared_down, everyone, torch.ones(x.shape[0], 1))
    return experts(x, gate_up, down, ids.clamp(max=gate_up.shape[0] - 1), weights) + shared
