"""The benches of a later version beside those of an earlier one, in turns, so that a slow hour is slow for both.

    git worktree add ../before d7bfa4e
    python bench/pairs.py ../before [--rounds 3] [--only sched fork sdk agents]

Each round runs every bench in both trees, now the one first and now the other, each with the interpreter of its tree's
`.venv`, or with this one where there is none. A figure is the median of the rounds, and the ratio is that of the
medians: at most 1 means not slower. `agents` has the earlier tree's shipped model in both, for another model draws
other answers. `fork` is measured at 8 k in the place of 32 k, whose rows take minutes to compute. Three rounds
take three to four minutes on a quiet machine with two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES: dict[str, tuple[str, ...]] = {
    "sched": ("plan_us_p50", "plan_us_waiting", "apply_us_p50"),
    "fork": ("fork_us_1k", "fork_us_32k"),
    "sdk": ("client_us_per_token",),
    "agents": ("overhead_ms_per_turn", "cpu_ms_per_turn"),
}
"""What is compared, by bench: of each, less is better."""
LONG_FORK = 8192
TOLD: dict[str, str] = {"fork_us_32k": f"fork_us_{LONG_FORK // 1024}k"}
"""Figures that are not what their bench calls them."""


def environment(tree: Path) -> dict[str, str]:
    """The tree's own packages come before what this interpreter has installed."""
    parts = [tree, tree / "engine", tree / "kernels", tree / "tools"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, parts))}


def run(tree: Path, bench: str, model: Path) -> dict[str, float]:
    """The last line of one run. Raises `CalledProcessError` when the bench fails."""
    own = tree / ".venv/bin/python"
    python = str(own if own.exists() else sys.executable)
    if bench == "fork":
        command = [python, "-c", f"import bench.fork as fork; fork.LONG = {LONG_FORK}; fork.main()"]
    else:
        command = [python, f"bench/{bench}.py", *(["--model", str(model)] if bench == "agents" else [])]
    done = subprocess.run(command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return {TOLD.get(name, name): figures[name] for name in FIGURES[bench]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _ = parser.add_argument("before", type=Path, help="a tree of the earlier version")
    _ = parser.add_argument("--rounds", type=int, default=3)
    _ = parser.add_argument("--only", nargs="+", choices=tuple(FIGURES), default=tuple(FIGURES))
    options = parser.parse_args()
    before = options.before.resolve()
    (
        before / "tools/__init__.py"
    ).touch()  # a folder without it gives way to a package of this name further down the path
    model = before / "agentspeed/models/nano"
    taken: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(options.rounds):
        for bench in options.only:
            sides = [(0, before), (1, ROOT)]
            for side, tree in sides if number % 2 == 0 else sides[::-1]:
                for name, value in run(tree, bench, model).items():
                    taken.setdefault(f"{bench} {name}", ([], []))[side].append(value)
            print(f"round {number + 1} of {options.rounds}: {bench}", file=sys.stderr, flush=True)
    figures: dict[str, dict[str, float]] = {}
    for name, (first, second) in taken.items():
        was, now = statistics.median(first), statistics.median(second)
        figures[name] = {"before": was, "now": now, "ratio": round(now / was, 3)}
        ranges = " ".join(
            f"{min(side):g} to {max(side):g}" + ("," if side is first else "") for side in (first, second)
        )
        print(f"{name:28} {was:>9.4g} {now:>9.4g}   {now / was:.2f} x   ({ranges})")
    print(json.dumps({"bench": "pairs", "rounds": options.rounds, **figures}))


if __name__ == "__main__":
    main()
