"""What users can rely on when the engine runs on a GPU: every test of it in one call, a line for each.

    python bench/gpu_sessions.py [--only WORDS] [--log FOLDER] [--seconds N]

The tests are those of tests/ that need a GPU: equality with float64 on the CPU (forks, rewinds, preemption, batches,
the host tier), the sampling kernel against the CPU's sampler, and sessions (tools, grammars, forks, a killed engine,
cancels, a full pool, no memory). Groups of them run at once, each in a process of its own; what takes all of the GPU's
memory runs alone at the end. A line says `passed`, `FAILED` with the reason, or `skipped`; the exit code is 1 when one
failed, and 2 when none ran. Whole outputs are in the log folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

ROOT = Path(__file__).resolve().parent.parent
SESSIONS, ENGINE = "tests/integration/test_cuda_sessions.py", "tests/integration/test_cuda_engine.py"
ALONE = "without_room"
GROUPS: dict[str, tuple[str, ...]] = {
    "sampling": ("tests/integration/test_cuda_sampling.py",),
    "models": ("tests/unit/engine/models/test_models_forward.py", "-k", "cuda or lower"),
    "hidden rows": (
        "tests/unit/engine/models/test_rows_nobody_sees.py",
        "tests/integration/test_poisoned_pages.py",
        "-k",
        "cuda",
    ),
    "equality": ("tests/integration/test_engine_process_equality.py", "-k", "cuda"),
    "host tier": ("tests/integration/test_engine_process_host.py", "-k", "cuda"),
    "engine, depth 0": (ENGINE, "-k", "depth0"),
    "engine, depth 1": (ENGINE, "-k", "depth1"),
    "engine, sessions": (ENGINE, "-k", "not depth"),
    "batch invariance": (
        "tests/integration/test_cuda_invariance.py",
        "tests/integration/test_batch_invariant_engine.py",
        "-k",
        "not cpu",
    ),
    "cache in fp8": ("tests/integration/test_cuda_fp8_cache.py",),
    "sessions, asyncio": (SESSIONS, "-k", f"asyncio and not {ALONE}"),
    "sessions, trio": (SESSIONS, "-k", f"trio and not {ALONE}"),
}
LAST = {"memory": (SESSIONS, "-k", ALONE)}
_LINE = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.+?) - (.*)")


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    test: str
    said: str
    """passed, FAILED or skipped."""
    reason: str = ""

    @property
    def line(self) -> str:
        return f"{self.said:8} {self.test}{f': {self.reason}' if self.reason else ''}"


def outcomes(output: str) -> list[Outcome]:
    """Of a verbose run of pytest, in its order."""
    said: dict[str, str] = {}
    reasons: dict[str, str] = {}
    words = {"PASSED": "passed", "FAILED": "FAILED", "ERROR": "FAILED", "SKIPPED": "skipped"}
    for line in output.splitlines():
        if found := _LINE.match(line):
            said[found[1]] = words[found[2]]
        elif found := _REASON.match(line):
            reasons[found[1]] = found[2]
    return [Outcome(test, said.get(test, "FAILED"), reasons.get(test, "")) for test in dict.fromkeys([*said, *reasons])]


def run(name: str, arguments: Sequence[str], seconds: float, log: Path | None) -> list[Outcome]:
    """One group; a run that takes longer counts as a failure of whatever it had not said yet."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", *arguments]
    paths = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "400"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    late = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        late = True
    if log is not None:
        (log / f"{name.replace(', ', '-').replace(' ', '-')}.log").write_text(output)
    found = outcomes(output)
    if late:
        found.append(Outcome(name, "FAILED", f"the rest of it was not through after {seconds:g} s"))
    elif process.returncode not in (0, 1, 5):
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
        found.append(Outcome(name, "FAILED", f"pytest ended with status {process.returncode}: {last}"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="groups whose name has one of these words, comma-separated")
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=220.0, help="of a group")
    arguments = parser.parse_args()
    if arguments.log is not None:
        arguments.log.mkdir(parents=True, exist_ok=True)
    words = [word for word in arguments.only.split(",") if word] or [""]
    started, every = time.monotonic(), list[Outcome]()
    for groups in (GROUPS, LAST):
        chosen = {name: how for name, how in groups.items() if any(word in name for word in words)}
        with ThreadPoolExecutor(max(len(chosen), 1)) as pool:
            running = [pool.submit(run, name, how, arguments.seconds, arguments.log) for name, how in chosen.items()]
            for name, one in zip(chosen, running, strict=True):
                found = one.result()
                print(f"-- {name}, {time.monotonic() - started:.0f} s after the start")
                print("\n".join(outcome.line for outcome in found), flush=True)
                every += found
    counts = {said: sum(one.said == said for one in every) for said in ("passed", "FAILED", "skipped")}
    print(", ".join(f"{count} {said}" for said, count in counts.items()), f"in {time.monotonic() - started:.0f} s")
    return 1 if counts["FAILED"] else 0 if counts["passed"] else 2


if __name__ == "__main__":
    sys.exit(main())
