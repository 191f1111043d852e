"""Where nano's training starts: two attention heads that together can already copy.

The first layer's head 0 looks one token back and notes what stood there. The second layer's heads 0 and 1 look for the
place whose note is the present token, and bring what stands at that place: so a text that has begun as an earlier one
goes on as that one. Learning to copy from nothing takes most of a small model's training; from here it takes little.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.nano.model import Attention, Nano

_LOOK_BACK = 6.0
"""Strength of "one token back": the next best place gets a tenth of its weight."""
_CONSTANT = 0.2
"""A component all embeddings have, so that a position can be sought whatever the token."""
_LIKENESS = 5.0
"""Strength of "the same token": a match outweighs a hundred other tokens."""
_NOTE, _BRING = 0.1, 0.7


@torch.no_grad()
def start_with_copying(model: Nano) -> None:
    """Needs two layers of at least two heads. An embedding has the notes first, then the token, last a constant."""
    notes = model.shape.value
    embedding = model.embed_tokens.weight
    embedding[:, :notes] = 0.0
    embedding[:, -1] = _CONSTANT
    first, second = (_attention(model, layer) for layer in (0, 1))
    _look_back(first, embedding)
    _note(first, notes)
    _seek(second, notes)
    _bring(second, notes)


def _attention(model: Nano, layer: int) -> Attention:
    found = model.layers[layer].self_attn
    if not isinstance(found, Attention):
        raise TypeError(f"layer {layer} has no attention")
    return found


def _look_back(attention: Attention, embedding: Tensor) -> None:
    """Head 0: the turned query one place earlier is the key, whatever stands at either place."""
    shape = attention.shape
    constant = float(_CONSTANT / embedding.pow(2).mean(-1).sqrt().mean())
    angles = shape.theta ** -(torch.arange(0, shape.rope, 2) / shape.rope)
    keys = attention.kv_a_proj_with_mqa.weight[shape.kv_rank :]
    keys.zero_()
    keys[0::2, -1] = _LOOK_BACK / constant
    queries = attention.q_proj.weight[: shape.nope + shape.rope]
    queries.zero_()
    queries[shape.nope :: 2, -1] = _LOOK_BACK / constant * angles.cos()
    queries[shape.nope + 1 :: 2, -1] = -_LOOK_BACK / constant * angles.sin()


def _note(attention: Attention, notes: int) -> None:
    """Head 0: what stands there goes into the notes."""
    shape = attention.shape
    latent = attention.kv_a_proj_with_mqa.weight[: shape.kv_rank]
    latent[:notes] = _selection(notes, shape.hidden, notes)
    values = _head(attention.kv_b_proj, 0, shape.nope + shape.value)
    values.zero_()
    values[shape.nope :] = _selection(shape.value, shape.kv_rank, 0)
    attention.o_proj.weight[:, : shape.value] = _NOTE * _selection(shape.value, shape.hidden, 0).T


def _seek(attention: Attention, notes: int) -> None:
    """Heads 0 and 1: the present token is sought in the notes."""
    shape = attention.shape
    attention.kv_a_proj_with_mqa.weight[: shape.nope] = _selection(shape.nope, shape.hidden, 0)
    for head in (0, 1):
        queries = _head(attention.q_proj, head, shape.nope + shape.rope)
        queries.zero_()
        queries[: shape.nope] = _LIKENESS * _selection(shape.nope, shape.hidden, notes)
        keys = _head(attention.kv_b_proj, head, shape.nope + shape.value)
        keys.zero_()
        keys[: shape.nope] = _selection(shape.nope, shape.kv_rank, 0)


def _bring(attention: Attention, notes: int) -> None:
    """Heads 0 and 1: part of the token at the place found is added here, and so becomes the likeliest next one."""
    shape = attention.shape
    width = shape.kv_rank - shape.nope
    token = 2 * notes
    attention.kv_a_proj_with_mqa.weight[shape.nope : shape.kv_rank] = _selection(width, shape.hidden, token)
    for head, start in ((0, 0), (1, shape.value)):
        count = max(0, min(shape.value, width - start))
        values = _head(attention.kv_b_proj, head, shape.nope + shape.value)
        values[shape.nope : shape.nope + count] = _selection(count, shape.kv_rank, shape.nope + start)
        out = attention.o_proj.weight[:, head * shape.value : head * shape.value + count]
        out[:] = _BRING * _selection(count, shape.hidden, token + start).T


def _head(layer: nn.Linear, head: int, width: int) -> Tensor:
    return layer.weight[head * width : (head + 1) * width]


def _selection(rows: int, columns: int, start: int) -> Tensor:
    """Row i picks component `start` + i."""
    found = torch.zeros(rows, columns)
    found[torch.arange(rows), start + torch.arange(rows)] = 1.0
    return found
