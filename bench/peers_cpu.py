"""Ours beside other engines on a CPU: the same random weights, the same conversations, in turns; ratios with quartiles.

    make peer-vllm peer-llama               # once, each in an environment of its own below .peers
    python bench/peers_cpu.py --minutes 35  # ours, vLLM eager and compiled, llama.cpp, transformers: what is installed
    python bench/peers_cpu.py --sides agentspeed,llama --only decode --part 0.02   # a quick look
    python bench/peers_cpu.py --server name=http://127.0.0.1:8001   # and what serves OpenAI's completions already

Cases: eight turns, decode at 4 k of one and of 16, prefill of 4 k, eight branches at 8 k, 16 agents that pause with
half the cache they would like, measured in a window while all of them go on (`bench/peers_loop.py`), and a recorded
coding agent with lengths and tool times scaled by 0.1. In each round
of a case every engine plays it, with texts and an order drawn anew; a ratio is taken within a round and told as the
median. A peer that was much slower than the best one plays a case once. Servers are started here and stay until the
end; none but the one that plays has anything to do. A peer that is not there is named in the JSON, which is the last
line, with what it needs. What must be reached and is not is printed as MISSED.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
from agentspeed_engine.serve.tuning import MALLOC

if TYPE_CHECKING:
    from bench.peers_sides import Side
    from bench.peers_workload import Case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="v3-50m", help="a configuration in bench/models")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weights", choices=("dtype", "int8", "int8-32"), default="dtype", help="ours alone")
    parser.add_argument("--turns-in-place", type=int, help="ours alone: the engine's option of that name")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="where peers are installed")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--sides", default="", help="names, or beginnings of names, with commas between; all if empty")
    parser.add_argument("--only", default="", help="parts of names of cases, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="begin nothing that would end later")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a side may take for a case")
    parser.add_argument("--part", type=float, default=1.0, help="of all lengths, for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # servers are ended on the way out
    print(json.dumps(asyncio.run(compared(options))))


def checkpoint(name: str, dtype: str) -> Path:
    """With the weights for llama.cpp beside the others, where it knows the architecture."""
    from bench.peers_gguf import write_gguf
    from tests.support.random_checkpoint import make_checkpoint

    folder = ROOT / ".checkpoints" / f"{name}-{dtype}"
    if not (folder / "tokenizer_config.json").exists():
        make_checkpoint(json.loads((ROOT / f"bench/models/{name}.json").read_text()), folder, dtype=dtype)
    if not (folder / "model.gguf").exists():
        write_gguf(folder, folder / "model.gguf")
    return folder


def seated(options: argparse.Namespace, absent: dict[str, str]) -> dict[str, Side]:
    """The engines that are here; `absent` gets the others, each with what it needs."""
    from bench.peers_served import Absent, Completions, Launched, Served, llama, vllm
    from bench.peers_sides import Ours, Transformers
    from bench.peers_table import OURS

    model, threads = checkpoint(options.model, options.dtype), options.threads
    ours = {"dtype": options.dtype, "weights": options.weights, "turns_in_place": options.turns_in_place}
    makers = {
        OURS: lambda: Ours(model, threads, **ours),
        "vllm eager": lambda: Launched("vllm eager", vllm(options.peers / "vllm", model, threads, eager=True)),
        "vllm compiled": lambda: Launched("vllm compiled", vllm(options.peers / "vllm", model, threads, eager=False)),
        "llama.cpp": lambda: Launched("llama.cpp", llama(options.peers / "llama.cpp", model, threads)),
        "transformers": lambda: Transformers(model, threads, options.dtype),
    }
    for given in options.server:
        name, url = given.split("=", 1)
        makers[name] = lambda url=url: Served(url, Completions())
    wanted = [one for one in options.sides.split(",") if one]
    sides: dict[str, Side] = {}
    for name, make in makers.items():
        if wanted and not any(name.startswith(one) for one in wanted):
            absent[name] = "not asked for"
            continue
        try:
            sides[name] = make()
        except Absent as why:
            absent[name] = str(why)
    return sides


async def compared(options: argparse.Namespace) -> dict[str, Any]:
    from bench.peers_table import lines, told
    from bench.peers_workload import cases

    began, absent = time.monotonic(), dict[str, str]()
    sides = seated(options, absent)
    for name, why in absent.items():
        print(f"absent: {name}: {why}", flush=True)
    parts = options.only.split(",")
    rounds = [
        [case for case in cases(options.part, turn) if any(part in case.name for part in parts)]
        for turn in range(options.rounds)
    ]
    chosen = rounds[0]
    table = Table(sides, absent, options.limit, began + 60 * options.minutes)
    try:
        # Case by case: where the time ends, what has been played has all of its rounds.
        for of_case in zip(*rounds, strict=True):
            for turn, case in enumerate(of_case):
                await table.round(turn, case)
    finally:
        for side in sides.values():
            await side.close()
    print()
    for case in chosen:
        print("\n".join(lines(case, table.found.get(case.name, {}), judged=options.part == 1)))
    asked = {"model": options.model, "dtype": options.dtype, "weights": options.weights, "threads": options.threads}
    asked["turns_in_place"] = options.turns_in_place
    run = {"bench": "peers_cpu", **asked, "rounds": options.rounds, "part": options.part, "load": os.getloadavg()[0]}
    results = {case.name: told(case, table.found.get(case.name, {})) for case in chosen}
    return run | {"minutes": round((time.monotonic() - began) / 60, 1), "absent": absent, "cases": results}


SETTLE = 1.5
"""Seconds before a side plays: threads of the one before spin for a while after its last answer."""


class Table:
    """Plays rounds until the time is up; `found` is by case, side and round."""

    def __init__(self, sides: dict[str, Side], absent: dict[str, str], limit: float, end: float) -> None:
        self.found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        self._sides, self._absent, self._limit, self._end = sides, absent, limit, end
        self._draw = random.Random(1)
        self._took: dict[tuple[str, str], float] = {}
        """Seconds, by case and side."""

    async def round(self, turn: int, case: Case) -> None:
        from bench.peers_table import plays_on

        found = self.found.setdefault(case.name, {name: {} for name in self._sides})
        names = [name for name in self._sides if turn == 0 or plays_on(case, name, found)]
        left = self._end - time.monotonic()
        if left <= 0 or sum(self._took.get((case.name, name), 0.0) for name in names) > left:
            print(f"{turn} {case.name:22} not played: {left:.0f} s are left", flush=True)
            return
        for name in self._draw.sample(names, len(names)):
            await self._play(turn, case, name)

    async def _play(self, turn: int, case: Case, name: str) -> None:
        from bench.peers_served import Absent, TooSlow

        started = time.monotonic()
        limit = self._limit
        try:
            await self._sides[name].start(case.pool_tokens)
            await asyncio.sleep(SETTLE)
            started = time.monotonic()
            limit = max(0.0, min(limit, self._end - started))
            figures = case.figures(await self._sides[name].play(case, limit))
        except (Absent, TooSlow) as why:
            said = f"took more than {limit:.0f} s" if isinstance(why, TooSlow) else str(why)
            self._absent[f"{name}: {case.name}"] = said
            print(f"{turn} {case.name:22} {name:14} absent: {said}", flush=True)
            return
        finally:
            self._took[case.name, name] = time.monotonic() - started
        self.found[case.name][name][turn] = figures
        shown = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
        print(f"{turn} {case.name:22} {name:14} {shown}  ({self._took[case.name, name]:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
