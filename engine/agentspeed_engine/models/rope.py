"""The angles of rotary embeddings for any position, and the factors that yarn puts on them and on scores."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.rope_config import Llama3Rope, RopeConfig, Yarn


@final
class Rope:
    """Cosines and sines [T, rope / 2]. Frequencies are float32 numbers by definition: models are trained so."""

    __slots__ = ("_cos", "_dtype", "_sin")

    def __init__(
        self, config: RopeConfig, context_limit: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        frequencies, factor = _frequencies(config)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        positions = torch.arange(context_limit, dtype=wide)
        angles = positions[:, None] * frequencies.to(wide)
        self._dtype = dtype
        self._cos = (angles.cos() * factor).to(dtype).to(device)
        self._sin = (angles.sin() * factor).to(dtype).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]


def half_order(rope: int) -> list[int]:
    """Order that takes interleaved pairs (0, 1), (2, 3), ... to pairs (i, i + rope / 2)."""
    return [*range(0, rope, 2), *range(1, rope, 2)]


def yarn_scale(factor: float, weight: float) -> float:
    """How much yarn raises magnitudes for contexts `factor` times as long (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    bases = config.theta ** (torch.arange(0, config.width, 2, dtype=torch.float32) / config.width)
    match config.scaling:
        case Yarn() as yarn:
            return _yarn_frequencies(config, yarn, bases), _yarn_factor(yarn)
        case Llama3Rope() as llama3:
            return _llama3_frequencies(llama3, 1.0 / bases), 1.0
        case None:
            return 1.0 / bases, 1.0


def _yarn_frequencies(config: RopeConfig, yarn: Yarn, bases: Tensor) -> Tensor:
    low, high = (_turn_dim(beta, config, yarn) for beta in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.width - 1)
    span = high - low or 0.001
    stretched = ((torch.arange(config.width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (yarn.factor * bases) * stretched + 1.0 / bases * (1 - stretched)


def _turn_dim(turns: float, config: RopeConfig, yarn: Yarn) -> float:
    """The (fractional) pair that makes `turns` full turns over the original context."""
    return config.width * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


def _yarn_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_scale(yarn.factor, yarn.mscale) / yarn_scale(yarn.factor, yarn.mscale_all_dim)
    return yarn_scale(yarn.factor, 1.0) * yarn.attn_factor


def _llama3_frequencies(scaling: Llama3Rope, plain: Tensor) -> Tensor:
    """Waves that turn less than `low` times over the original context are stretched, those above `high` times kept."""
    waves = 2 * math.pi / plain
    share = (scaling.original_context / waves - scaling.low) / (scaling.high - scaling.low)
    between = (1 - share) * plain / scaling.factor + share * plain
    found = torch.where(waves > scaling.original_context / scaling.low, plain / scaling.factor, between)
    return torch.where(waves < scaling.original_context / scaling.high, plain, found)
