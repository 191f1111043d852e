"""How far weights in 8 bits move a model: logits against float64 on random shapes and on nano, and nano's tasks.

    python bench/int8.py
    python bench/int8.py --tasks 0     # logits alone

Logits: the distance to float64, norm over norm, median over the positions of a prompt and of tokens decoded behind it,
for activations in bfloat16 with weights in bfloat16, int8, int8-32 and fp8 (quantised from bfloat16); and how often the
likeliest token is float64's.
Tasks: held-out requests of `bench/nano.py` that must call tools and answer, through the public SDK. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio
import numpy as np
import torch

from agentspeed import Engine
from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import load
from bench.nano import tool_shares
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint

FORMATS = (None, "int8", "int8-32", "fp8")
PAGE, PROMPT, DECODED = 64, 240, 24
SHAPES = ("v3-50m", "qwen3-50m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"logits": {}, "tasks": {}}
    for name in (*SHAPES, "nano"):
        figures["logits"][name] = {str(kind or "bfloat16"): found for kind, found in logits(name).items()}
        print(name, figures["logits"][name], flush=True)
    for kind in FORMATS if options.tasks else ():
        figures["tasks"][str(kind or "bfloat16")] = found = anyio.run(tasks, kind, options.tasks)
        print("nano", kind or "bfloat16", found, flush=True)
    print(json.dumps({"bench": "int8", "tasks_each": options.tasks, **figures}))


def logits(name: str) -> dict[str | None, dict[str, float]]:
    folder = NANO if name == "nano" else checkpoint(name)
    exact = run(folder, "float64", None)
    return {kind: moved(run(folder, "bfloat16", kind), exact) for kind in FORMATS}


def checkpoint(name: str) -> Path:
    """A random one of a configuration in bench/models, in bfloat16; made once."""
    folder = ROOT / ".checkpoints" / f"{name}-int8"
    if not (folder / "tokenizer_config.json").exists():
        config = json.loads((ROOT / f"bench/models/{name}.json").read_text())
        make_checkpoint(config, folder, dtype="bfloat16")
    return folder


def moved(got: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far logits [positions, ids] lie from others."""
    apart = float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
    same = float((got.argmax(-1) == exact.argmax(-1)).double().mean())
    return {"distance": round(apart, 4), "likeliest_equal": round(same, 3)}


def run(folder: Path, dtype: Any, weights: Any) -> torch.Tensor:
    model = load(folder, dtype=dtype, pages=8, page_tokens=PAGE, weights=weights)
    text = (ROOT / "docs/explanation/architecture.md").read_text().encode()[:PROMPT]
    ids, trail = list(text), Trail(PAGE, list(range(8)))
    noise = np.random.default_rng(1)
    parts = [model.forward(batch(PAGE, [(trail, ids)])).clone()]
    for token in noise.integers(97, 122, DECODED).tolist():
        parts.append(model.forward(batch(PAGE, [(trail, [token])])).clone())
    return torch.cat(parts).double()


async def tasks(weights: Any, count: int) -> dict[str, float]:
    async with Engine(NANO, dtype="bfloat16", weights=weights or "dtype") as engine:
        return await tool_shares(engine, count)


if __name__ == "__main__":
    main()
