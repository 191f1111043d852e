"""Drives a loaded model without an engine: sequences with pages of their own, as many per step as a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentspeed_engine.models.inputs import FlatBatch, Run

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 300, "hidden_size": 48,
    "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.7,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "kv_lora_rank": 24, "q_lora_rank": 20,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rope_theta": 5000.0, "rope_interleave": True, "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""Small, and odd enough that a mixed-up dim shows."""


@dataclass
class Trail:
    """One path of tokens: pages shared with others first, then its own."""

    page_tokens: int
    pages: list[int]
    shared: int = 0
    """Tokens at the front that are a run of their own (full pages)."""
    known: int = 0
    runs: list[Run] = field(default_factory=list)


def batch(page_tokens: int, entries: Sequence[tuple[Trail, Sequence[int]]], select: str = "all") -> FlatBatch:
    """One step that feeds each sequence its ids. `select`: "all" rows or the "last" of each sequence."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chosen: list[int] = []
    runs: list[Run] = []
    shared: dict[tuple[int, ...], list[int]] = {}
    for sequence, new in entries:
        rows = list(range(len(ids), len(ids) + len(new)))
        at = range(sequence.known, sequence.known + len(new))
        ids += new
        positions += at
        slots += [sequence.pages[p // page_tokens] * page_tokens + p % page_tokens for p in at]
        sequence.known += len(new)
        front = sequence.shared // page_tokens
        if front:
            shared.setdefault(tuple(sequence.pages[:front]), []).extend(rows)
        own = sequence.pages[front : -(-sequence.known // page_tokens)]
        runs.append(
            Run(
                pages=np.array(own, np.int32),
                start=sequence.shared,
                tokens=sequence.known - sequence.shared,
                queries=np.array(rows, np.int32),
                causal=True,
            )
        )
        chosen += rows if select == "all" else rows[-1:]
    for pages, rows in shared.items():
        runs.append(
            Run(
                pages=np.array(pages, np.int32),
                start=0,
                tokens=len(pages) * page_tokens,
                queries=np.array(rows, np.int32),
                causal=False,
            )
        )
    return FlatBatch(
        ids=np.array(ids, np.int64),
        positions=np.array(positions, np.int64),
        slots=np.array(slots, np.int64),
        runs=tuple(runs),
        select=np.array(chosen, np.int64),
    )
