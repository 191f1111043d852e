"""Rows of logits under every rule, drawn by the sampling kernel of a device and by the sampler on the CPU."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampler import Draw, draw
from agentspeed_engine.exec.sampling_rows import on_device
from agentspeed_engine.exec.step_input import Sample
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_kernels.triton import sampling
from agentspeed_kernels.workspace import Workspace

RULES = (
    Sampling(temperature=0.0, logprobs=3),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=50, logprobs=0),
    Sampling(temperature=1.3, top_p=0.9, logprobs=5),
    Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, logprobs=20),
    Sampling(temperature=2.0, top_k=1),
    Sampling(temperature=1e-3),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, top_k=7000, top_p=0.999, logprobs=2),
)


def disagreements(kind: torch.dtype, penalised: bool, *, vocabulary: int, seed: int, device: str = "cpu") -> list[str]:
    """What the device draws or reports otherwise, a line for each row that differs; a third of the rows is masked, and
    every second one has penalties and a bias where `penalised`."""
    rng = np.random.default_rng(seed)
    count = len(RULES)
    logits = torch.from_numpy(rng.normal(size=(count, vocabulary)) * 3).to(kind)
    logits[3, :] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 10:] = -float("inf")
    logits[5, 7] = 60.0
    masks = [None if i % 3 else rng.random(vocabulary) < 0.3 for i in range(count)]
    keys = [(random.Random(i + seed).getrandbits(63), i, 3 * i) for i in range(count)]
    positions = [100 + i + seed for i in range(count)]
    adjustments = {i: adjustment(rng, vocabulary) for i in range(0, count, 2)} if penalised else {}
    held = logits.to(device)
    rows = sampling_rows(RULES, masks, keys, positions, held, adjustments)
    got = sampling.sample(held, rows, Workspace(held.device))
    wanted = [
        draw(logits[i].float().numpy(), rule, keys[i], positions[i], masks[i], adjustments.get(i))
        for i, rule in enumerate(RULES)
    ]
    return [f"row {i}, {rule}: {what}" for i, rule in enumerate(RULES) if (what := _difference(got, i, wanted[i]))]


def _difference(got: sampling.Sampled, row: int, wanted: Draw) -> str:
    """Empty where there is none."""
    if got.faulty[row].item():
        return f"fault {got.faulty[row].item()}"
    if got.ids[row].item() != wanted.id:
        return f"drew {got.ids[row].item()}, not {wanted.id}"
    if wanted.logprob is None or wanted.draw_logprob is None:
        return ""
    found = got.top_ids[row, : len(wanted.top)].tolist()
    if found != [number for number, _ in wanted.top]:
        return f"best ids {found}, not {wanted.top}"
    told = [got.logprob[row].item(), got.draw_logprob[row].item(), *got.top_logprobs[row, : len(found)].tolist()]
    right = [wanted.logprob, wanted.draw_logprob, *(value for _, value in wanted.top)]
    worst = max(abs(one - other) for one, other in zip(told, right, strict=True))
    return "" if worst < 1e-9 else f"log-probabilities {told}, not {right}"


def adjustment(rng: np.random.Generator, vocabulary: int) -> Adjustment:
    ids = np.flatnonzero(rng.random(vocabulary) < 0.2)
    scale = np.where(rng.random(len(ids)) < 0.5, 1.7, 1.0).astype(np.float32)
    return Adjustment(ids, scale, (rng.normal(size=len(ids)) * 5).astype(np.float32))


def sampling_rows(
    rules: Sequence[Sampling],
    masks: Sequence[np.ndarray | None],
    keys: Sequence[tuple[int, int, int]],
    positions: Sequence[int],
    logits: torch.Tensor,
    adjustments: Mapping[int, Adjustment],
) -> sampling.SamplingRows:
    """As the engine makes them."""
    samples = [
        Sample(TurnSpec(turn=i, branch=BranchId(i), sampling=rule, draw_key=key, stop_strings=(), grammar=None,
                        consumed_ids=(), prompt_tokens=0), position)
        for i, (rule, key, position) in enumerate(zip(rules, keys, positions, strict=True))
    ]  # fmt: skip
    return on_device(samples, {i: mask for i, mask in enumerate(masks) if mask is not None}, adjustments, logits)
