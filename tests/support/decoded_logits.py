"""Logits of a prompt and of tokens decoded behind it one by one, and how far those of another format are from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentspeed_engine.models.loaded import LoadedModel
from tests.support.paged import Trail, batch

PAGES = (3, 1, 4, 0, 5, 2)
"""In the order in which a sequence takes them, of a model that is loaded with six."""


def decoded_logits(model: LoadedModel, ids: Sequence[int], prompt: int, page_tokens: int) -> torch.Tensor:
    """float64 [ids, vocabulary]; the first `prompt` ids are one step."""
    trail = Trail(page_tokens, list(PAGES))
    steps = [ids[:prompt], *([token] for token in ids[prompt:])]
    return torch.cat([model.forward(batch(page_tokens, [(trail, step)])).clone() for step in steps]).double()


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the error over the norm, of the median row: where rounding flips a choice of experts, few differ more."""
    return float(((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
