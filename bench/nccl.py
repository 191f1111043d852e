"""One model on several GPUs against one: the same workload must draw the same tokens over NCCL.

    python bench/nccl.py [--ranks 2] [--only equal,decode]

On a machine with that many GPUs. `equal`: every turn of a workload (forks, rewinds, preemptions, a grammar, host
copies) must draw the same in float64 with `tp`, and with `dp`, as on one GPU. `decode`: tokens/s of V2-Lite's
shapes in bfloat16 at 4 k, with `tp` and on one GPU. A line is printed for each engine as it ends, and the last line is
JSON: `tokens_equal_tp` and `_dp`, the largest `logprob_gap`, `seconds` of each workload, tokens/s. The exit code is 1
where tokens differ or an engine failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "bench")]

from gpu_engine import CONTEXT, DRAWN, MODEL, decode

from tests.support.engine_client import engine
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn

Turns = list[tuple[list[int], list[float]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="equal,decode")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script where there is no GPU")
    arguments = parser.parse_args()
    meshes: dict[str, dict[str, int]] = {"one": {}, "tp": {"tp": arguments.ranks}, "dp": {"dp": arguments.ranks}}
    line: dict[str, Any] = {}
    broken = False
    turns: dict[str, Turns] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        wanted = arguments.only.split(",")
        if "equal" in wanted:
            folder = make_checkpoint(CONFIG, Path(scratch) / "model", seed=3, dtype="float64")
            for name, mesh in meshes.items():
                try:
                    seconds[name], turns[name] = _workload(Path(scratch), name, str(folder), mesh, arguments.device)
                    print(f"{name}: {len(turns[name])} turns in {seconds[name]:.2f} s", flush=True)
                except Exception:  # noqa: BLE001 - one mesh that fails must not hide the others; the exit code tells
                    broken = True
                    print(f"{name}: {traceback.format_exc()[-2500:]}", flush=True)
            for name in ("tp", "dp"):
                if name in turns and "one" in turns:
                    equal, gap = _apart(turns["one"], turns[name])
                    line |= {f"tokens_equal_{name}": int(equal), f"logprob_gap_{name}": gap}
                    broken = broken or not equal
            line["seconds"] = {name: round(spent, 2) for name, spent in seconds.items()}
        if "decode" in wanted:
            for name in ("one", "tp"):
                for batch in (1, 32):
                    try:
                        rate = _decode(Path(scratch) / f"{name}-{batch}", meshes[name], batch, arguments.device)
                        line[f"tokens_s_{name}_batch_{batch}"] = round(rate, 1)
                        print(f"{name}: {rate:.1f} tokens/s at batch {batch}, {CONTEXT} tokens", flush=True)
                    except Exception:  # noqa: BLE001 - as above
                        broken = True
                        print(f"{name}, decode: {traceback.format_exc()[-2500:]}", flush=True)
    print(json.dumps(line))
    return int(broken)


def _workload(scratch: Path, name: str, model: str, mesh: dict[str, int], device: str) -> tuple[float, Turns]:
    place = scratch / name
    place.mkdir()
    with engine(place, model=model, **mesh, **OPTIONS | {"device": device}) as process:
        front = process.connect()
        front.socket.settimeout(60.0)
        started = time.perf_counter()
        turns = drawn(front)
        return time.perf_counter() - started, turns


def _apart(one: Turns, several: Turns) -> tuple[bool, float]:
    """Whether all ids are equal, and the largest difference of two log-probabilities."""
    gaps = [
        abs(mine - theirs)
        for left, right in zip(one, several, strict=True)
        for mine, theirs in zip(left[1], right[1], strict=False)
    ]
    return [ids for ids, _ in one] == [ids for ids, _ in several], max(gaps)


def _decode(place: Path, mesh: dict[str, int], batch: int, device: str) -> float:
    place.mkdir()
    with engine(
        place, model=MODEL, device=device, dtype="bfloat16", pages=3000, context_limit=8192, prefill_chunk=2048,
        record="off", **mesh,
    ) as process:  # fmt: skip
        front = process.connect()
        front.socket.settimeout(120.0)
        spent, _ = decode(front, random.Random(0), batch)
        return batch * DRAWN / spent


if __name__ == "__main__":
    raise SystemExit(main())
