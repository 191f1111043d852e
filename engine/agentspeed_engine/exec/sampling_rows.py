"""How each sample of a step is drawn, as arrays for the sampling kernel: one copy to the device for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import is_not
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.step_input import Sample
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.sampling import LEAST_TEMPERATURE
from agentspeed_kernels.triton.sampling import SamplingRows, noise_state
from agentspeed_kernels.uploads import unwaited


def asked_of(sample: Sample) -> int:
    """How many of the likeliest ids the turn wants to hear of; -1: nothing at all."""
    count = sample.spec.sampling.logprobs
    return -1 if count is None else count


@final
class RepeatedRows:
    """What `on_device` gives, step after step: what turns ask for is copied again only where other turns sample."""

    __slots__ = ("_rows", "_specs")

    def __init__(self) -> None:
        self._specs: tuple[TurnSpec, ...] = ()
        self._rows: SamplingRows | None = None

    def on_device(
        self,
        samples: Sequence[Sample],
        masks: Mapping[int, NDArray[np.bool_]],
        adjustments: Mapping[int, Adjustment],
        logits: Tensor,
    ) -> SamplingRows:
        if masks or adjustments:
            return on_device(samples, masks, adjustments, logits)
        specs, rows = tuple(one.spec for one in samples), self._rows
        if rows is None or len(specs) != len(self._specs) or any(map(is_not, specs, self._specs)):
            self._specs, self._rows = specs, on_device(samples, masks, adjustments, logits)
            return self._rows
        if all(one.sampling.temperature < LEAST_TEMPERATURE for one in specs):
            return rows  # greedy: no noise is looked at
        return replace(rows, state=unwaited(_noise(samples), logits.device))


def _noise(samples: Sequence[Sample]) -> NDArray[np.int64]:
    return noise_state([one.spec.draw_key for one in samples], [one.position for one in samples])


def on_device(
    samples: Sequence[Sample],
    masks: Mapping[int, NDArray[np.bool_]],
    adjustments: Mapping[int, Adjustment],
    logits: Tensor,
) -> SamplingRows:
    """By place among the samples, which are the rows of `logits` [B, vocab]: `masks` [vocab], what grammars allow
    there, and what penalties and biases make of the logits."""
    count, (_, vocabulary), device = len(samples), logits.shape, logits.device
    words = -(-vocabulary // 32)
    given = [one.spec.sampling for one in samples]
    mask_row = np.full(count, -1, np.int32)
    bits = np.zeros((max(len(masks), 1), words), np.int32)
    for row, (place, allowed) in enumerate(masks.items()):
        mask_row[place] = row
        packed = np.packbits(allowed, bitorder="little")
        bits.view(np.uint8).reshape(bits.shape[0], -1)[row, : packed.size] = packed
    changed_row = np.full(count, -1, np.int32)
    changed_row[list(adjustments)] = range(len(adjustments))
    touched, scale, shift = _flat(adjustments.values(), vocabulary)
    parts: tuple[NDArray[Any], ...] = (
        np.array([one.temperature if one.temperature >= LEAST_TEMPERATURE else 0.0 for one in given], np.float64),
        np.array([0 if one.top_k is None else min(one.top_k, vocabulary) for one in given], np.int32),
        np.array([one.top_p for one in given], np.float64),
        np.array([one.min_p for one in given], np.float64),
        _noise(samples),
        mask_row,
        np.array([asked_of(one) for one in samples], np.int32),
        bits,
        changed_row,
        np.array(list(adjustments), np.int64),
        touched,
        scale,
        shift,
    )
    # Each begins at a multiple of 16 bytes: compiled kernels rely on where an array begins.
    starts = np.concatenate([[0], np.cumsum([-(-part.nbytes // 16) * 16 for part in parts])]).tolist()
    flat = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = flat.numpy()
    for start, part in zip(starts, parts, strict=False):
        view[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    block = flat.to(device, non_blocking=True)
    tensors = [
        block[start : start + part.nbytes].view(torch.from_numpy(part[:0]).dtype).view(part.shape)
        for start, part in zip(starts, parts, strict=False)
    ]
    temperature, top_k, top_p, min_p, state, masked, asked, held, changed, *rest = tensors
    rows, at, divisors, added = rest
    return SamplingRows(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        state=state,
        mask_row=masked,
        asked=asked,
        mask_words=held,
        changed_row=changed,
        changed=_changed(logits[rows], at, divisors, added) if adjustments else None,
    )


def _flat(adjustments: Iterable[Adjustment], vocabulary: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of all together: places in [row, vocab] taken as one axis, scales and shifts."""
    held = list(adjustments)
    if not held:
        return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32)
    return (
        np.concatenate([row * vocabulary + one.ids for row, one in enumerate(held)]),
        np.concatenate([one.scale for one in held]),
        np.concatenate([one.shift for one in held]),
    )


def _changed(logits: Tensor, at: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`exec.penalties.Adjustment.of`, of several rows and in float32."""
    changed = logits.float()
    flat = changed.view(-1)
    held = flat[at]
    most = torch.finfo(torch.float32).max
    other = (torch.where(held > 0, held / scale, held * scale) + shift).clamp(-most, most)
    flat[at] = torch.where(torch.isinf(held), held, other)
    return changed
