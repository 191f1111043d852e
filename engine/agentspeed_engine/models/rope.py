"""The angles of rotary embeddings for any position, and the factor yarn puts on attention scores."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.config import ModelConfig, Yarn


@final
class Rope:
    """Cosines and sines [T, rope / 2]. Frequencies are float32 numbers by definition: models are trained so."""

    __slots__ = ("_cos", "_dtype", "_sin")

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        frequencies, factor = _frequencies(config)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        positions = torch.arange(config.context_limit, dtype=wide)
        angles = positions[:, None] * frequencies.to(wide)
        self._dtype = dtype
        self._cos = (angles.cos() * factor).to(dtype)
        self._sin = (angles.sin() * factor).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]


def score_scale(config: ModelConfig) -> float:
    scale = (config.nope + config.rope) ** -0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return float(scale)


def half_order(rope: int) -> list[int]:
    """Order that takes interleaved pairs (0, 1), (2, 3), ... to pairs (i, i + rope / 2)."""
    return [*range(0, rope, 2), *range(1, rope, 2)]


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    pairs = config.rope // 2
    bases = config.rope_theta ** (torch.arange(0, config.rope, 2, dtype=torch.float32) / config.rope)
    plain = 1.0 / bases
    if config.yarn is None:
        return plain, 1.0
    yarn = config.yarn
    low, high = (_turn_dim(beta, config, yarn) for beta in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope - 1)
    span = high - low or 0.001
    stretched = ((torch.arange(pairs, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (yarn.factor * bases) * stretched + plain * (1 - stretched), _yarn_factor(yarn)


def _turn_dim(turns: float, config: ModelConfig, yarn: Yarn) -> float:
    """The (fractional) pair that makes `turns` full turns over the original context."""
    return config.rope * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def _yarn_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
