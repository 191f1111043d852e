"""Where a decode step's time on a GPU goes: kernels, the gaps between them, and what the GPU waits for the host.

    python bench/gpu_profile.py [--batches 1,32] [--context 4096] [--tp 2] [--json FILE]

An engine in this process and a client of its socket in another, as `bench/gpu.py --sections engine` has them. For each
batch: a round without the profiler (milliseconds a step, the host's time to launch and to collect one, and `wait`: the
time on the device from the end of a step to the start of the next one's graph, of which must be <= 5 % of a step at
batch 32), then one under cProfile (what the
host does to launch) and one under torch's profiler (launches, microseconds and share by kernel; it makes gaps longer).
`--device cpu --model random:bench/models/tiny.json` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "bench")]
os.environ.setdefault("TRITON_INTERPRET", "0")

import torch

from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import EngineOptions, build
from agentspeed_kernels.triton import launching
from tests.support.engine_client import Front

MODEL = f"random:{ROOT / 'bench/models/v2-lite.json'}"
WARM, TIMED, TRACED = 24, 128, 24
"""Tokens of each branch in a round."""
WAIT_MUST = 0.05
_cuda: Any = torch.cuda


class _HostEvent:
    """A CUDA event's stand-in where there is no GPU."""

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: _HostEvent) -> float:
        return 1e3 * (later.at - self.at)


class Watched:
    """An executor that notes when the device begins and ends each step, and what the host takes for it."""

    def __init__(self, inner: Any, loaded: Any, on_gpu: bool) -> None:
        self._inner, self._event = inner, _cuda.Event if on_gpu else _HostEvent
        self._forward = loaded.forward
        self.calls: cProfile.Profile | None = None
        """Of the host while it launches."""
        loaded.forward = self._watched_forward
        self.clear()

    def clear(self) -> None:
        self.begins: list[Any] = []
        self.ends: list[Any] = []
        self.launching: list[float] = []
        self.collecting: list[float] = []

    def _watched_forward(self, batch: Any, name: Any = None) -> Any:
        def named(ids: Any) -> None:
            if name is not None:
                name(ids)
            self._mark(self.begins)

        if self._event is _HostEvent:
            self._mark(self.begins)
            return self._forward(batch, name)
        return self._forward(batch, named)

    def _mark(self, marks: list[Any]) -> None:
        event = self._event(enable_timing=True)
        event.record()
        marks.append(event)

    def launch(self, step: Any) -> Any:
        started = time.perf_counter()
        if self.calls is not None:
            self.calls.enable()
        pending = self._inner.launch(step)
        if self.calls is not None:
            self.calls.disable()
        self._mark(self.ends)
        self.launching.append(time.perf_counter() - started)
        return pending

    def collect(self, pending: Any) -> Any:
        started = time.thread_time()
        sampled = self._inner.collect(pending)
        self.collecting.append(time.thread_time() - started)
        return sampled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def figures(self) -> dict[str, float]:
        """Medians over the steps of a round, milliseconds."""
        pairs = list(zip(self.ends[2:-3], self.begins[3:-2], strict=False))
        waits = [max(0.0, end.elapsed_time(begin)) for end, begin in pairs]
        steps = [one.elapsed_time(other) for one, other in zip(self.ends[2:-3], self.ends[3:-2], strict=True)]
        return {
            "step": statistics.median(steps),
            "wait": statistics.median(waits),
            "wait mean": statistics.fmean(waits),
            "host launch": 1e3 * statistics.median(self.launching[3:-2]),
            "host collect": 1e3 * statistics.median(self.collecting[3:-2]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tp", type=int, default=1, help="ranks, a GPU each; rank 0 is looked at")
    parser.add_argument("--late", action="store_true", help="kernels wait for the whole of the one before them")
    parser.add_argument("--json", default=None)
    parser.add_argument("--client", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        client(arguments.client, int(arguments.batches), arguments.context)
        return
    on_gpu = arguments.device == "cuda"
    if arguments.late:
        launching.early = lambda given: False
    started = time.perf_counter()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    pages = (max(batches) + 1) * (arguments.context // 64 + 8) + 32
    options = EngineOptions(
        model=arguments.model, device=arguments.device, dtype="bfloat16" if on_gpu else "float32", pages=pages,
        context_limit=arguments.context + 1024, depth=1, prefill_chunk=2048, extend_tokens=1024, record="off",
        tp=arguments.tp,
    )  # fmt: skip
    built = build(options, print)
    loaded = built.model.loaded  # type: ignore[union-attr]
    inner = next(iter(built.executors), None) or CpuExecutor(built.model, built.vocabulary, depth=built.core.depth)
    watched = Watched(inner, loaded, on_gpu)
    executor: Any = watched  # it hands on what it does not watch
    loop = EngineLoop(built, executor=executor)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/engine.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        loop.listen(listener)
        thread = threading.Thread(target=loop.run, daemon=True)
        thread.start()
        print(f"-- ready after {time.perf_counter() - started:.1f} s", flush=True)
        for batch in batches:
            figures = profiled(path, batch, arguments, watched, on_gpu)
            if arguments.json is not None:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(figures) + "\n")
        loop.stop()
        thread.join(10.0)
        listener.close()
    print(f"-- {time.perf_counter() - started:.1f} s in all")


def profiled(path: str, batch: int, arguments: Any, watched: Watched, on_gpu: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--client", path, "--batches", str(batch), "--context", str(arguments.context)]
    figures: dict[str, Any] = {"batch": batch, "context": arguments.context}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def round_of(tokens: int) -> float:
            print(tokens, file=process.stdin, flush=True)
            assert process.stdout is not None
            return float(process.stdout.readline())

        assert process.stdout.readline() == "ready\n", "the client ended"
        round_of(WARM)
        watched.clear()
        seconds = round_of(TIMED)
        if on_gpu:
            _cuda.synchronize()
        figures |= {"client": 1e3 * seconds / TIMED, **watched.figures()}
        share = figures["wait"] / figures["step"]
        figures["wait share"] = share
        shown = "  ".join(f"{name} {figures[name]:.3f}" for name in list(figures)[2:])
        print(f"batch {batch} at {arguments.context}: ms: {shown}")
        if batch == 32:
            print(
                f"  wait share {share:.3f}, must {WAIT_MUST}: {'met' if share <= WAIT_MUST else 'MISSED'}", flush=True
            )
        watched.calls = cProfile.Profile()
        round_of(TRACED)
        watched.calls, calls = None, watched.calls
        print_calls(calls, TRACED)
        figures["kernels"] = traced(lambda: round_of(TRACED), TRACED)
        print("end", file=process.stdin, flush=True)
    return figures


def print_calls(calls: cProfile.Profile, steps: int) -> None:
    """What the host does in a launch, by its own time; the profiler makes calls of Python longer."""
    said = io.StringIO()
    found = pstats.Stats(calls, stream=said)
    print(f"  launching, {1e3 * found.total_tt / steps:.3f} ms a step under cProfile; seconds of {steps} steps:")  # type: ignore[attr-defined]
    found.sort_stats("tottime").print_stats(22)
    found.sort_stats("cumulative").print_stats("agentspeed", 22)
    for line in said.getvalue().splitlines():
        if line.strip() and line.strip()[0].isdigit() and "/" in line:
            print("    " + line.replace(str(ROOT), "").strip()[-130:])


def traced(act: Any, steps: int) -> list[dict[str, Any]]:
    """One line a kernel, of what the device did while `act` ran; what comes once a step or less is joined."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if _cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        act()
        if _cuda.is_available():
            _cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    ran = sorted(
        (event["ts"], event["dur"], event["name"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not ran:
        print("  nothing ran on a device")
        return []
    taken: defaultdict[str, list[float]] = defaultdict(list)
    gaps: list[float] = []
    end = ran[0][0]
    for at, duration, name in ran:
        gaps.append(max(0.0, at - end))
        end = max(end, at + duration)
        taken[name.split("(")[0][:58]].append(duration)
    span = end - ran[0][0]
    short, long = [gap for gap in gaps if gap < 20], [gap for gap in gaps if gap >= 20]
    print(f"  {len(ran) / steps:.0f} launches and {span / steps:.0f} us a step; gaps under 20 us "
          f"{sum(short) / steps:.0f} us, of 20 and more {sum(long) / steps:.0f} us ({len(long)} of them)")  # fmt: skip
    lines = [
        {"kernel": name, "a step": len(all_of) / steps, "us a step": sum(all_of) / steps,
         "us each": statistics.median(all_of), "share": sum(all_of) / span}
        for name, all_of in sorted(taken.items(), key=lambda item: -sum(item[1]))
    ]  # fmt: skip
    for line in lines[:34]:
        print(f"  {line['kernel']:58} {line['a step']:6.1f} x {line['us each']:7.1f} us = {line['us a step']:7.1f} us "
              f"{100 * line['share']:5.1f} %", flush=True)  # fmt: skip
    return lines


def client(path: str, batch: int, context: int) -> None:
    """Rounds of decoding in all branches at once, each as long as a line of stdin says."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(path)
    front = Front(link)
    front.socket.settimeout(120.0)
    draw = random.Random(0)
    most = front.welcome.vocab_size - 16
    branches = [front.open(private=True) for _ in range(batch)]
    prompts = [[draw.randrange(3, most) for _ in range(context)] for _ in branches]
    front.finish(*[front.start(branch, ids, max_tokens=2) for branch, ids in zip(branches, prompts, strict=True)])
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\n":
            break
        started = time.perf_counter()
        turns = [front.start(branch, [draw.randrange(3, most)], max_tokens=int(line)) for branch in branches]
        front.finish(*turns)
        print(time.perf_counter() - started, flush=True)
    for branch in branches:
        front.end(branch)


if __name__ == "__main__":
    main()
