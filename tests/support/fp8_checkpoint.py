"""Writes a random checkpoint in fp8 as DeepSeek-V3 is published: blocks of 128 × 128, the head as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.random_checkpoint import make_checkpoint

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_MATRIX = re.compile(r"(_proj|_proj_with_mqa|indexer\.wq_b|indexer\.wk)\.weight$")
_WIDE = re.compile(r"indexer\.weights_proj")


def make_fp8_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """No block's scale is that of its largest number, so that nobody finds it again by looking at the numbers."""
    make_checkpoint(config | {"quantization_config": BLOCKS}, folder, seed=seed, dtype="bfloat16")
    path, noise = folder / "model.safetensors", torch.Generator().manual_seed(seed)
    held = load_file(path)
    for name in [name for name in held if _MATRIX.search(name) and not _WIDE.search(name)]:
        weight = held[name].float()
        rows, columns = weight.shape
        blocks = torch.rand(-(-rows // 128), -(-columns // 128), generator=noise)
        scales = (0.6 + blocks) * weight.abs().max() / 240
        wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        held[name] = (weight / wide).to(torch.float8_e4m3fn)
        held[name + "_scale_inv"] = scales
    save_file(held, path, metadata={"format": "pt"})
    return folder
