"""Weights of a loaded model lie in large pages of the kernel's where they fill them, and take no more memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from agentspeed_engine.models import memory
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.memory import LARGE_PAGE, in_large_pages, large_spans
from tests.support.large_pages import NEEDS_LARGE_PAGES, in_large, resident
from tests.support.random_checkpoint import make_checkpoint
from tests.support.weights_held import bytes_held

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
def test_weights_that_fill_no_large_page_are_laid_side_by_side() -> None:
    weights: list[torch.Tensor] = []
    holes: list[torch.Tensor] = []
    for number in range(40):
        weights.append(torch.full((MB // 4,), float(number)))
        holes.append(torch.zeros(MB // 8))
    del holes
    large = in_large()
    in_large_pages(weights)
    assert in_large() - large > 38 * MB
    assert [weight.unique().tolist() for weight in weights] == [[float(number)] for number in range(40)]
    addresses = [weight.data_ptr() for weight in weights]
    assert [b - a for a, b in itertools.pairwise(addresses)] == [MB] * 39


@NEEDS_LARGE_PAGES
def test_views_and_what_they_are_of_stay_one_memory() -> None:
    whole = torch.randn(2, 3, 2048, 64)
    view, turned, twice = whole.flatten(0, 1), whole[1], whole.view(torch.int32)
    wanted, before, held = whole.clone(), whole.data_ptr(), resident()
    in_large_pages([view, turned, twice, view])
    assert before != view.data_ptr() == whole.data_ptr() == twice.data_ptr()
    assert turned.data_ptr() == whole.data_ptr() + whole[0].nbytes
    assert torch.equal(whole, wanted) and torch.equal(view, wanted.flatten(0, 1)) and torch.equal(turned, wanted[1])
    assert torch.equal(twice, wanted.view(torch.int32))
    assert resident() - held < NOISE


@NEEDS_LARGE_PAGES
def test_parts_of_other_memory_files_and_large_weights_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * MB))
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=MB, dtype=torch.float32)
    part, large = torch.ones(2, MB)[0], torch.ones(5 * MB)
    before = [one.data_ptr() for one in (mapped, part, large)]
    in_large_pages([mapped, part.view(-1), large, *(torch.ones(MB) for _ in range(4))])
    assert [one.data_ptr() for one in (mapped, part, large)] == before


@pytest.mark.parametrize("missing", ["large pages", "what is mapped", "advice"])
def test_a_machine_that_gives_none_keeps_weights_as_they_are(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "large pages":
        monkeypatch.setattr(memory, "_ASKED", Path("/nowhere"))
    elif missing == "what is mapped":
        monkeypatch.setattr(memory, "_anonymous", _refused)
    elif sys.platform == "linux":  # PR_SET_THP_DISABLE: advice is taken, and nothing comes of it
        code = (
            "import ctypes, torch; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"
            "from agentspeed_engine.models.memory import in_large_pages, zeros_on_demand\n"
            "weights = [torch.full((1 << 18,), float(i)) for i in range(16)]; in_large_pages(weights)\n"
            "assert [float(one.sum()) for one in weights] == [i * float(1 << 18) for i in range(16)]\n"
            "assert not zeros_on_demand((1 << 23,), torch.uint8, streamed=True).any()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        return
    weights = [torch.full((MB // 4,), float(number)) for number in range(8)]
    before = [weight.data_ptr() for weight in weights]
    in_large_pages(weights)
    assert [weight.data_ptr() for weight in weights] == before


def _refused() -> list[tuple[int, int]]:
    raise PermissionError("maps")


@NEEDS_LARGE_PAGES
@pytest.mark.parametrize("weights", ["int8", "int8-32", "fp8"])
def test_a_loaded_models_weights_in_8_bits_lie_in_large_pages(weights: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIG, tmp_path / "model", dtype="bfloat16")
    large = in_large()
    model = load(folder, dtype="float32", pages=2, page_tokens=64, threads=1, weights=weights)
    # Where memory is scattered the kernel may give fewer than all.
    assert in_large() - large > bytes_held(model) / 4


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
