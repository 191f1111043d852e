"""Muon for the hidden matrices of nano: momentum steps made orthogonal, which need fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For two-dimensional weights only; everything else goes to AdamW."""

    def __init__(
        self, weights: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append(weight)
            for weights in alike.values():
                self._move(weights, group)

    def _move(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """All weights of one shape in one go: few large operations instead of many small ones."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        moving: list[Tensor] = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(moving, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, moving, group["momentum"])
        rows, columns = weights[0].shape
        steps = orthogonal(torch.stack(list(ahead))) * (-group["lr"] * max(1.0, rows / columns) ** 0.5)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
        torch._foreach_add_(weights, list(steps))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrices whose singular values are all 1, by Newton-Schulz steps; any leading dimensions."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
