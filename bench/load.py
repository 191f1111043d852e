"""How much memory a load takes at its peak, beside what stays, and how fast it reads.

    python bench/load.py
    python bench/load.py --shape experts --as bfloat16

A random checkpoint of some hundred MB in bfloat16 (a dense one; one whose layers are 16 experts), or in fp8, is loaded
in a process of its own, set up as an engine is: in float32 with matrices in that or in bfloat16, in bfloat16, and with
its matrices in fp8, int8 and int8-32. Its footprint is the weights as they are kept; the peak is what the operating
system says at most, beyond what the process had before, without what it had freed.
Read from the page cache: the rate, by a second of the clock and by one of the processor, says nothing of disks. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

MUST = 1.15
NANO = ROOT / "agentspeed" / "models" / "nano"
BASE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        **BASE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 12,
        "intermediate_size": 4096,
    },
    "experts": {
        **BASE, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 8,
        "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a checkpoint is loaded."""

    dtype: Literal["float32", "bfloat16"]
    weights: Literal["fp8", "int8", "int8-32", "bfloat16"] | None = None
    stored: bool = False
    """In fp8 already; else in bfloat16."""


WAYS = {
    "float32": Way(dtype="float32"),
    "float32, matrices in bfloat16": Way(dtype="float32", weights="bfloat16"),
    "bfloat16": Way(dtype="bfloat16"),
    "quantised to int8": Way(dtype="bfloat16", weights="int8"),
    "quantised to int8-32": Way(dtype="bfloat16", weights="int8-32"),
    "quantised to fp8": Way(dtype="bfloat16", weights="fp8"),
    "fp8 as it is": Way(dtype="bfloat16", weights="fp8", stored=True),
    "fp8 to float32": Way(dtype="float32", stored=True),
    "fp8 to bfloat16": Way(dtype="bfloat16", stored=True),
    "fp8 to int8": Way(dtype="bfloat16", weights="int8", stored=True),
    "fp8 to int8-32": Way(dtype="bfloat16", weights="int8-32", stored=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="nothing: all of them")
    parser.add_argument("--as", dest="ways", choices=WAYS, action="append", help="in memory; nothing: each")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(Path(options.load), WAYS[options.ways[0]])))
        return
    figures: dict[str, dict[str, float]] = {}
    for shape, stored in product(options.shape or SHAPES, (False, True)):
        names = [name for name in options.ways or WAYS if WAYS[name].stored == stored]
        for name, found in _each(shape, names):
            figures[f"{shape}, {name}"] = found
            verdict = "reached" if found["ratio"] <= MUST else "MISSED"
            print(
                f"{shape}, {name}: peak ÷ footprint {found['ratio']}, at most {MUST}: {verdict}, "
                f"{found['beyond_MB']} MB beyond, {found['MB_per_processor_second']} MB/s of the processor",
                flush=True,
            )
    met = all(found["ratio"] <= MUST for found in figures.values())
    print(json.dumps({"bench": "load", "met": met, **figures}, ensure_ascii=False))


def _each(shape: str, names: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Ways that load one checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = made(SHAPES[shape], Path(scratch), WAYS[names[0]]) if names else Path(scratch)
        for name in names:
            yield name, measured(folder, name)


def made(config: dict[str, Any], folder: Path, way: Way) -> Path:
    """Its checkpoint."""
    from tests.support.fp8_checkpoint import make_fp8_checkpoint
    from tests.support.random_checkpoint import make_checkpoint

    return make_fp8_checkpoint(config, folder) if way.stored else make_checkpoint(config, folder, dtype="bfloat16")


def measured(folder: Path, name: str) -> dict[str, float]:
    """What a process of its own says of the load."""
    from agentspeed_engine.serve.tuning import tuned

    command = [sys.executable, __file__, "--load", str(folder), "--as", name]
    found: dict[str, float] = json.loads(
        subprocess.check_output(command, env={**tuned(os.environ), "OMP_NUM_THREADS": "1"})
    )
    return found


def loaded(folder: Path, way: Way) -> dict[str, float]:
    """In this process, which does nothing else."""
    from agentspeed_engine.models.catalog import load
    from agentspeed_engine.models.memory import given_back

    _ = load(
        NANO, dtype=way.dtype, pages=1, weights=way.weights
    )  # so that what a first load brings into memory is not counted
    with given_back():  # nor does a load look smaller by what the first one freed
        before = resident("VmRSS")
    began, worked = time.perf_counter(), time.process_time()
    model = load(folder, dtype=way.dtype, pages=1, weights=way.weights)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    peak = resident("VmHWM") - before
    stays, file = model.info.weight_bytes, (folder / "model.safetensors").stat().st_size
    return {
        "ratio": round(peak / stays, 3),
        "MB": round(stays / 1e6),
        "beyond_MB": round((peak - stays) / 1e6, 1),
        "MB_per_second": round(file / seconds / 1e6),
        "MB_per_processor_second": round(file / processor / 1e6),
    }


def resident(field: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most so far ("VmHWM", which no parent hands down)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
