"""A larger model that computes what a smaller one does: what is new reads, and writes nothing yet.

Weights that have learnt something are a better start than random ones, also for a wider and deeper model. New inputs of
a matrix get random weights where what they read is still zero, new outputs get zeros: so the result is the same, and
every new weight has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.nano.model import Nano, Shape

_SAME = ("vocab", "heads", "kv_rank", "nope", "rope", "value", "experts", "top", "first_dense", "scale", "theta")


@torch.no_grad()
def grown(small: Nano, shape: Shape) -> Nano:
    """A model of `shape`, at least as wide and as deep as `small`, with the logits of `small`. Raises `ValueError` for
    a shape that is smaller, or another one in its heads or number of experts."""
    was = small.shape
    others = [name for name in _SAME if getattr(shape, name) != getattr(was, name)]
    smaller = [
        name for name in ("hidden", "layers", "inner", "expert_inner") if getattr(shape, name) < getattr(was, name)
    ]
    if others or smaller:
        raise ValueError(f"a model cannot grow into another {', '.join(others + smaller)}: {was} to {shape}.")
    model = Nano(shape)
    state, old = model.state_dict(), small.state_dict()
    for name, weight in state.items():
        if name in old:
            _place(name, weight, old[name], was, shape)
    model.load_state_dict(state)
    return model


def _place(name: str, new: Tensor, old: Tensor, was: Shape, shape: Shape) -> None:
    """Puts the old weights into the new ones."""
    if name.endswith((".gate.weight", ".up.weight")):
        for one, other in zip(torch.split(new, shape.expert_inner), torch.split(old, was.expert_inner), strict=True):
            _corner(one, other, keep=True)
    elif name.endswith(".down.weight"):
        pairs = zip(torch.split(new, shape.expert_inner, 1), torch.split(old, was.expert_inner, 1), strict=True)
        for one, other in pairs:
            _corner(one, other, keep=False)
    elif name.endswith("layernorm.weight") or name == "norm.weight":
        # the mean of squares is over more components, of which the new ones are zero
        share = 1.0 if "kv_a" in name else (was.hidden / shape.hidden) ** 0.5
        new[: old.shape[0]] = old * share
    else:
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
        _corner(new, old, keep=not writes)


def _corner(new: Tensor, old: Tensor, *, keep: bool) -> None:
    """`keep`: what is new stays random."""
    if not keep:
        new.zero_()
    new[tuple(slice(0, size) for size in old.shape)] = old
