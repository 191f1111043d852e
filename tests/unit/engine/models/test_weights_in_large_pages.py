"""Weights of a loaded model lie in large pages of the kernel's where they fill them, and take no more memory."""

from __future__ import annotations

from pathlib import Path

import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.memory import LARGE_PAGE, in_large_pages, large_spans
from tests.support.large_pages import NEEDS_LARGE_PAGES, in_large, resident
from tests.support.random_checkpoint import make_checkpoint

MB = 1 << 20
NOISE = 8 * MB
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


def test_ranges_side_by_side_are_taken_together_and_cut_to_whole_large_pages() -> None:
    """Of three of 1.5 MB, with the allocator's few bytes between them, one large page begins in the first."""
    first = 10 * LARGE_PAGE + MB
    beside = [(first + number * (3 * MB // 2 + 4096), 3 * MB // 2) for number in range(3)]
    assert large_spans(beside[::-1]) == [(11 * LARGE_PAGE, 12 * LARGE_PAGE)]


def test_ranges_that_are_apart_fill_no_large_page_between_them() -> None:
    assert large_spans([(MB, 2 * MB), (4 * MB, MB)]) == []
    assert large_spans([]) == []


@NEEDS_LARGE_PAGES
def test_what_is_moved_keeps_its_numbers_and_takes_no_more_memory() -> None:
    weights = [torch.arange(3 * MB // 8, dtype=torch.float32) + number for number in range(24)]
    before, sums = resident(), [float(weight.double().sum()) for weight in weights]
    in_large_pages(weights)
    assert [float(weight.double().sum()) for weight in weights] == sums
    assert resident() - before < NOISE


@NEEDS_LARGE_PAGES
def test_a_loaded_models_weights_lie_in_large_pages(tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIG, tmp_path / "model", dtype="bfloat16")
    footprint = 2 * (2 * (3 * 1024 * 4096 + 1024 * (2 * 1024 + 2 * 512)) + 2 * 2048 * 1024)
    before, large = resident(), in_large()
    model = load(folder, dtype="float32", pages=2, page_tokens=64, threads=1, weights="bfloat16")
    assert resident() - before < 1.15 * footprint + NOISE
    # Where memory is scattered the kernel may give fewer than all.
    assert in_large() - large > footprint / 4
    del model
