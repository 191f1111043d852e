"""Sampling on the device: the same rules and the same noise as the engine's sampler on the CPU, in float64.

Draws are equal to the CPU's but for *named ties*: two scores, or a share and the edge of top-p or min-p, that differ by
less than rounding: 1e-12 relative, and 1e-6 for the edge of top-p, whose shares are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.workspace import Workspace

MOST_LOGPROBS = 20
PARTS = 16
"""Programs that draw for one row: one multiprocessor alone would take longer than a small model's step."""
BLOCK, WARPS = 4096, 16
DRAW_BLOCK, DRAW_WARPS = 1024, 8
"""Logits that a program takes at once, and its warps: where a row is one program, and where it has `PARTS`."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@final
@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """What is asked of each row of logits, on the device."""

    temperature: Tensor
    """[B] float64; 0 is greedy."""
    top_k: Tensor
    """[B] int32; 0 is none."""
    top_p: Tensor
    """[B] float64; 1 is none."""
    min_p: Tensor
    """[B] float64; 0 is none."""
    state: Tensor
    """[B] int64: `noise_state` of the row's draw key and position."""
    mask_row: Tensor
    """[B] int32: the row of `mask_words` that holds what the grammar allows, or -1."""
    asked: Tensor
    """[B] int32: how many best ids are reported, up to MOST_LOGPROBS; -1 reports nothing."""
    mask_words: Tensor
    """[M, ceil(V / 32)] int32, bit i of word w allows id 32 w + i; at least one row."""
    changed_row: Tensor
    """[B] int32: the row of `changed` that is drawn from in place of the logits, or -1."""
    changed: Tensor | None
    """[C, V] float32: logits after penalties and a bias; None: no row has any."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Results of one launch; the log-probabilities and `top_ids` hold numbers only where they were asked for."""

    ids: Tensor
    """[B] int64"""
    logprob: Tensor
    """[B] float64, of the unmodified distribution"""
    draw_logprob: Tensor
    """[B] float64, of the distribution that the id was drawn from; 0 of a greedy row"""
    top_ids: Tensor
    """[B, MOST_LOGPROBS] int64"""
    top_logprobs: Tensor
    faulty: Tensor
    """[B] int32: 1 logits that are not finite numbers, 2 nothing that the grammar allows; such a row's id is void."""


def noise_state(keys: Sequence[tuple[int, int, int]], positions: Sequence[int]) -> NDArray[np.int64]:
    """[B]: the counter-based generator after the draw key and the position, as the CPU's sampler has it."""
    state = np.zeros(len(keys), np.uint64)
    columns = np.array(
        [
            [part & 0xFFFFFFFFFFFFFFFF for part in (*key, position)]
            for key, position in zip(keys, positions, strict=True)
        ],
        dtype=np.uint64,
    ).reshape(len(keys), 4)
    with np.errstate(over="ignore"):
        for part in columns.T:
            state = _mix(state + part * _GOLDEN + _GOLDEN)
    return state.view(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def sample(logits: Tensor, rows: SamplingRows, workspace: Workspace) -> Sampled:
    """Draws one id of each row of `logits` [B, V]; three launches and no wait."""
    device = device_code("sample")

    assert logits.stride(1) == 1
    count, vocabulary = logits.shape
    take = workspace.take
    best_id, best = take("sample_best_id", (count,), torch.int32), take("sample_best", (count,), torch.float64)
    least, total = take("sample_least", (count,), torch.float32), take("sample_total", (count,), torch.float64)
    faulty = take("sample_faulty", (count,), torch.int32)
    given = rows.changed is not None
    changed = (
        rows.changed if rows.changed is not None else take("sample_unchanged", (1,), torch.float32),
        rows.changed_row,
    )
    common = (logits, *changed, rows.mask_words, rows.mask_row, rows.temperature)
    exact = logits.dtype != torch.bfloat16 or given
    device.bounds[(count,)](
        *common, rows.top_k, rows.top_p, rows.asked, logits.stride(0), vocabulary, best_id, best, least, total,
        faulty, BLOCK=BLOCK, BITS=32 if exact else 16, CHANGED=given, num_warps=WARPS,
    )  # fmt: skip
    score = take("sample_score", (count, PARTS), torch.float64)
    part_id = take("sample_part_id", (count, PARTS), torch.int32)
    mass = take("sample_mass", (count, PARTS), torch.float64)
    device.draw[(count, PARTS)](
        *common, rows.min_p, rows.asked, rows.state, best, least, logits.stride(0), vocabulary, score, part_id, mass,
        PARTS=PARTS, BLOCK=DRAW_BLOCK, CHANGED=given, num_warps=DRAW_WARPS,
    )  # fmt: skip
    ids, logprob = take("sample_ids", (count,), torch.int64), take("sample_logprob", (count,), torch.float64)
    draw_logprob = take("sample_draw_logprob", (count,), torch.float64)
    top_ids = take("sample_top_ids", (count, MOST_LOGPROBS), torch.int64)
    top_logprobs = take("sample_top", (count, MOST_LOGPROBS), torch.float64)
    device.pick[(count,)](
        logits, *changed, rows.temperature, best_id, best, total, score, part_id, mass, rows.asked, logits.stride(0),
        vocabulary, ids, logprob, draw_logprob, top_ids, top_logprobs, PARTS=PARTS, BLOCK=BLOCK, MOST=MOST_LOGPROBS,
        CHANGED=given, num_warps=WARPS,
    )  # fmt: skip
    return Sampled(
        ids=ids,
        logprob=logprob,
        draw_logprob=draw_logprob,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        faulty=faulty,
    )
