"""One model on several GPUs against one: equal tokens, decode, what a sum costs, and a rank that is killed.

    python bench/nccl.py [--ranks 2] [--only equal,near,sums,decode,killed]

On a machine with that many GPUs. `equal`: every turn of a workload (forks, rewinds, preemptions, a grammar, host
copies) must draw the same in float64 with `tp`, and with `dp`, as on one GPU. `near`: the same in float32, where every
rank launches steps, as graphs, and draws by itself. `sums`: microseconds of a sum over all ranks of rows of 2048 in
bfloat16, in memory that GPUs share and by NCCL, in a graph and one by one. `decode`: tokens/s of V2-Lite's shapes in
bfloat16 at 4 k, with `tp` and on one GPU; the limit of a rank is its part of the weights and all of the cache.
`killed`: a rank is killed with SIGKILL while sessions draw, and they go on. A line is printed as each part ends, and
the last line is JSON. The exit code is 1 where tokens differ, an engine failed or a session was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "bench")]

from gpu_engine import CONTEXT, DRAWN, LATENT, decode, limit_seconds

from tests.support.engine_client import engine
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn

Turns = list[tuple[list[int], list[float]]]
BY_KERNELS: dict[str, Any] = CONFIG | {
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "hidden_size": 64,
}  # fmt: skip
"""Of sizes that the kernels of GPUs take."""
BATCHES = (1, 32)
MUST = {1: 0.9, 32: 1.0}
"""Tokens/s with `tp` to those of one GPU."""
AIM = 1.3
NEAR = 1e-3
"""Log-probabilities in float32 may lie so far apart."""
SUM_ROWS, SUM_WIDTH, SUMS = (1, 32, 512), 2048, 100
_LIMIT = 200.0
"""Seconds that a client waits for a frame."""


class Bench:
    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.ranks, self.device, self.scratch = arguments.ranks, arguments.device, scratch
        self.model, self.engines = arguments.model, arguments.engines.split(",")
        self.meshes: dict[str, dict[str, int]] = {"one": {}, "tp": {"tp": self.ranks}, "dp": {"dp": self.ranks}}
        self.line: dict[str, Any] = {}
        self.broken = False

    def part(self, name: str, work: Callable[[], None]) -> None:
        """One that fails must not hide the others; the exit code tells."""
        started = time.perf_counter()
        try:
            work()
        except Exception:  # noqa: BLE001 - as above
            self.broken = True
            print(f"{name}: {traceback.format_exc()[-3000:]}", flush=True)
        print(f"{name}: {time.perf_counter() - started:.1f} s in all", flush=True)

    def place(self, name: str) -> Path:
        found = self.scratch / name
        found.mkdir()
        return found

    # ---- tokens ---------------------------------------------------------------------------------------------------
    def equal(self) -> None:
        self._compared("float64", CONFIG, ("tp", "dp"), 0.0)

    def near(self) -> None:
        self._compared("float32", BY_KERNELS, ("tp",), NEAR)

    def _compared(self, dtype: str, config: dict[str, Any], meshes: tuple[str, ...], most_apart: float) -> None:
        folder = make_checkpoint(config, self.scratch / f"model-{dtype}", seed=3, dtype=dtype)
        turns: dict[str, Turns] = {}
        for name in ("one", *meshes):

            def work(name: str = name) -> None:
                turns[name] = self._workload(f"{name}-{dtype}", str(folder), self.meshes[name], dtype)

            self.part(f"{dtype}, {name}", work)
        for name in meshes:
            if name in turns and "one" in turns:
                equal, gap = apart(turns["one"], turns[name])
                self.line |= {f"turns_equal_{name}_{dtype}": equal, f"logprob_gap_{name}_{dtype}": gap}
                right = equal == len(turns["one"]) and (not most_apart or gap <= most_apart)
                print(f"{dtype}, {name}: {equal} of {len(turns['one'])} turns equal, {gap:.2g} apart", flush=True)
                self.broken = self.broken or not right

    def _workload(self, name: str, model: str, mesh: dict[str, int], dtype: str) -> Turns:
        given = OPTIONS | {"device": self.device, "dtype": dtype}
        with engine(self.place(name), model=model, **mesh, **given) as process:
            front = process.connect()
            front.socket.settimeout(_LIMIT)
            return drawn(front)

    # ---- seconds --------------------------------------------------------------------------------------------------
    def sums(self) -> None:
        folder = self.place("sums")
        command = [sys.executable, __file__, "--sums", str(folder), "--ranks", str(self.ranks), "--device", self.device]
        others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, self.ranks)]
        first = subprocess.run([*command, "--rank", "0"], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
        for other in others:
            other.wait(60)
        print(first.stdout, flush=True)
        self.line["sums"] = json.loads(first.stdout.splitlines()[-1])

    def decode(self) -> None:
        for name in self.engines:
            self.part(f"decode, {name}", lambda name=name: self._decode(name))
        for batch in BATCHES:
            one, several = (self.line.get(f"tokens_s_{name}_batch_{batch}") for name in ("one", "tp"))
            if one and several:
                times = several / one
                met = "met" if times >= MUST[batch] else "missed"
                aim = "met" if times >= AIM else "missed"
                self.line[f"times_batch_{batch}"] = round(times, 3)
                print(f"tp at batch {batch}: {times:.2f} of one GPU, must be {MUST[batch]}: {met}; aim {AIM}: {aim}",
                      flush=True)  # fmt: skip

    def _decode(self, name: str) -> None:
        mesh = self.meshes[name]
        started = time.perf_counter()
        with engine(
            self.place(f"decode-{name}"), model=self.model, device=self.device, dtype="bfloat16", pages=3000,
            context_limit=4608, prefill_chunk=2048, record="off", **mesh,
        ) as process:  # fmt: skip
            print(f"{name}: started in {time.perf_counter() - started:.1f} s", *process.progress[-3:], sep="\n  ",
                  flush=True)  # fmt: skip
            front = process.connect()
            front.socket.settimeout(_LIMIT)
            for batch in BATCHES:
                spent, steps = decode(front, random.Random(0), batch)
                limit = limit_seconds(batch, self.model, ranks=mesh.get("tp", 1))
                self.line[f"tokens_s_{name}_batch_{batch}"] = round(batch * DRAWN / spent, 1)
                self.line[f"ms_{name}_batch_{batch}"] = round(1e3 * spent / DRAWN, 3)
                self.line[f"share_{name}_batch_{batch}"] = round(limit * DRAWN / spent, 3)
                print(f"{name}: {batch * DRAWN / spent:.1f} tokens/s at batch {batch}, {CONTEXT} tokens: "
                      f"{1e3 * spent / DRAWN:.3f} ms a token, {steps} steps, {limit * DRAWN / spent:.2f} of the limit",
                      flush=True)  # fmt: skip
        print(*process.errors.splitlines()[-8:], sep="\n  ", flush=True)

    # ---- a rank that is killed ------------------------------------------------------------------------------------
    def killed(self) -> None:
        # Imported late, with the SDK that it needs.
        from rank_runs import killed_on_gpus

        folder = make_checkpoint(BY_KERNELS, self.scratch / "killed", seed=4)
        found = killed_on_gpus(folder, self.ranks, self.device)
        self.line |= found
        self.broken = self.broken or bool(found["kill_sessions_lost"] or found["kill_processes_left"])
        print(f"killed: {json.dumps(found)}", flush=True)


def apart(one: Turns, several: Turns) -> tuple[int, float]:
    """How many turns have equal ids, and the largest difference of two log-probabilities of those."""
    pairs = [(left, right) for left, right in zip(one, several, strict=True) if left[0] == right[0]]
    gaps = [abs(a - b) for left, right in pairs for a, b in zip(left[1], right[1], strict=True)]
    return len(pairs), max(gaps, default=0.0)


def measured_sums(folder: Path, index: int, ranks: int, device_name: str) -> None:
    """One rank's part; rank 0 prints."""
    import torch

    from agentspeed_engine.exec.ranks.group import TorchGroup
    from agentspeed_engine.spmd.placement import Mesh
    from agentspeed_engine.spmd.plan import Collective

    cuda: Any = torch.cuda
    device = torch.device(device_name, index) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        cuda.set_device(index)
    group = TorchGroup(folder, Mesh(tp=ranks).rank(index), seconds=30, device=device)
    others = group.comm
    why = group.reach(sum_bytes=2 * SUM_ROWS[-1] * SUM_WIDTH, rows=64, row_bytes=2 * 102_400)
    step = Collective(kind="all_reduce", axis="tp", value="x", dim=0, width=SUM_WIDTH, between=("a", "b"))
    found: dict[str, Any] = {"refused": why}
    ways = {"nccl": others} | ({} if why else {"peers": group.comm})
    for name, comm in ways.items():
        for rows in SUM_ROWS:
            x = torch.ones(rows, SUM_WIDTH, dtype=torch.bfloat16, device=device)

            def many(comm: Any = comm, x: Any = x) -> None:
                for _ in range(SUMS):
                    comm.sum_call(step, lambda total, residual, _: (total, residual), x.fill_(0), x, None, ())

            try:
                found[f"{name}_{rows}"] = timed(many, device) / SUMS
                if device.type == "cuda":
                    graph = cuda.CUDAGraph()
                    with cuda.graph(graph, capture_error_mode="thread_local"):
                        many()
                    found[f"{name}_{rows}_graph"] = timed(graph.replay, device) / SUMS
            except Exception as error:  # noqa: BLE001 - the others are wanted all the same
                found[f"{name}_{rows}_error"] = str(error)[:300]
    if index == 0:
        print(json.dumps({name: round(us, 2) if isinstance(us, float) else us for name, us in found.items()}))
    group.close()


def timed(work: Callable[[], None], device: Any) -> float:
    """Microseconds; the median of nine after one."""
    import torch

    cuda: Any = torch.cuda
    spent = []
    for _ in range(10):
        if device.type == "cuda":
            cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            cuda.synchronize()
        spent.append(1e6 * (time.perf_counter() - started))
    return statistics.median(spent[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="equal,near,sums,decode,killed")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script where there is no GPU")
    parser.add_argument("--model", default=LATENT, help="of `decode`")
    parser.add_argument("--engines", default="one,tp", help="of `decode`")
    parser.add_argument("--sums", type=Path, help="the folder where ranks of `sums` meet: this is one of them")
    parser.add_argument("--rank", type=int, default=0, help="which")
    arguments = parser.parse_args()
    if arguments.sums is not None:
        measured_sums(arguments.sums, arguments.rank, arguments.ranks, arguments.device)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        for name in arguments.only.split(","):
            bench.part(name, getattr(bench, name))
    print(json.dumps(bench.line))
    return int(bench.broken)


if __name__ == "__main__":
    raise SystemExit(main())
