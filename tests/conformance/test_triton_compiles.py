"""What the compiler makes of the Triton kernels, without a GPU: matrix instructions, spills, shared memory.

Compiled is not run: numbers are checked by the interpreter, speed on the chip by bench/gpu.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from agentspeed_kernels.triton.compiled import out_of_turn

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = {"cuda:90": 232448, "cuda:100": 232448, "hip:gfx950": 163840}
"""Bytes of shared memory a program may use."""
MATRIX = {
    "cuda:90": {
        "rows-16": "mma",
        "rows-32": "mma",
        "rows-64": "wgmma",
        "rows-hopper-large": "wgmma",
        "rows-hopper-small": "wgmma",
        "gate_up_grouped": "mma",
        "down_grouped": "mma",
        "linear-blocks-few": "mma",
        "linear-blocks-decode": "mma",
        "linear-blocks-many": "mma",
        "linear-blocks-wide": "wgmma",
        "extend-wide": "wgmma",
        "linear_many-fp8": "mma",
        "gate_up_grouped-fp8": "mma",
        "down_grouped-fp8": "mma",
        "groups-16": "mma",
        "groups-64": "wgmma",
        "groups-extend-wide": "wgmma",
        "rows-fp8-cache-16": "mma",
        "rows-fp8-cache-32": "mma",
        "rows-fp8-cache-hopper": "wgmma",
        "groups-fp8-cache-16": "mma",
    },
    "cuda:100": {
        "linear-blocks-few": "mma",
        "linear-blocks-many": "mma",
        "rows-16": "mma",
        "rows-32": "mma",
        "gate_up_grouped": "mma",
        "extend-wide": "tcgen05",
        "gate_up_grouped-fp8": "mma",
        "groups-16": "mma",
        "groups-extend-wide": "tcgen05",
        "rows-fp8-cache-16": "mma",
        "groups-fp8-cache-16": "mma",
    },
    "hip:gfx950": {
        "linear-blocks-few": "mfma",
        "rows-16": "mfma",
        "gate_up_grouped": "mfma",
        "extend-narrow": "mfma",
        "gate_up_grouped-fp8": "mfma",
        "groups-16": "mfma",
        "rows-fp8-cache-16": "mfma",
        "groups-fp8-cache-16": "mfma",
    },
}
"""The matrix instructions a kernel must use there: without them it runs on a slower path."""
SPILLS = {"rows-hopper-large": 160, "rows-hopper-small": 80, "rows-fp8-cache-hopper": 64}
"""Bytes a thread may keep in local memory, outside the loops of these. All others: none."""


EARLY = {
    "rows-16", "rows-16-edge", "rows-32", "rows-64", "merge", "add_norm_linear", "queries_few", "choose", "scores",
    "gate_up_few", "down_few", "add_norm_linear-fp8", "linear_many-fp8", "gate_up_few-fp8", "down_few-fp8",
    "gate_up_grouped-fp8", "down_grouped-fp8", "linear-blocks-few", "linear-blocks-decode", "groups-16",
    "groups-16-edge", "groups-32", "groups-64", "groups-merge", "qkv_append", "add_up",
    "rows-fp8-cache-16", "rows-fp8-cache-16-edge", "rows-fp8-cache-32", "groups-fp8-cache-16",
    "groups-fp8-cache-16-edge", "groups-fp8-cache-32", "queries_few-fp8-cache", "qkv_append-fp8-cache",
}  # fmt: skip
"""Those that begin while the kernel before them runs."""


def compiled(target: str) -> dict[str, dict[str, Any]]:
    made = subprocess.run(
        [sys.executable, "-m", "agentspeed_kernels.triton.compiled", target],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")},
    )
    assert made.returncode == 0, made.stderr[-2000:]
    facts = [json.loads(line) for line in made.stdout.splitlines()]
    return {fact["name"]: fact for fact in facts}


def check(target: str) -> None:
    facts = compiled(target)
    assert not {name: fact["shared"] for name, fact in facts.items() if fact["shared"] > SHARED[target]}
    # Blocks of few and many rows add by one instruction; whether that of wide blocks adds alike a device is asked.
    alike = {tuple(facts[f"linear-blocks-{size}"]["matrix"]) for size in ("few", "decode", "many")}
    assert len(alike) == 1
    missing = {
        name: facts[name]["matrix"] for name, kind in MATRIX[target].items() if kind not in facts[name]["matrix"]
    }
    assert not missing
    spilled = {name: fact["spilled"] for name, fact in facts.items() if fact["spilled"] > SPILLS.get(name, 0)}
    assert not spilled
    early = {name for name, fact in facts.items() if fact["waits"]}
    assert early == (EARLY & set(facts) if target.startswith("cuda") else set())
    assert not {name: fact["out_of_turn"] for name, fact in facts.items() if fact["out_of_turn"]}
    if target == "cuda:90":
        # Latents come through bulk copies, not through registers.
        bulk = ("rows-16", "rows-16-edge", "rows-64", "extend-wide", "groups-16", "groups-extend-wide",
                "rows-fp8-cache-16", "groups-fp8-cache-16")  # fmt: skip
        assert all(facts[name]["bulk_copies"] for name in bulk)


@pytest.mark.timeout(300)
def test_kernels_compile_for_hopper_with_its_matrix_instructions_and_no_spill_in_a_loop() -> None:
    check("cuda:90")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["cuda:100", "hip:gfx950"])
def test_kernels_compile_for_chips_that_were_never_run(target: str) -> None:
    check(target)


@pytest.mark.parametrize(
    ("order", "faults"),
    [
        ("ld wait next st", 0),
        ("ld wait st", 0),
        ("wait next st wait next st", 0),
        ("st wait next", 1),
        ("next wait st", 1),
        ("wait next next", 1),
        ("next st", 2),
        ("ld st", 0),
    ],
)
def test_a_kernel_waits_before_it_writes_and_before_it_lets_the_next_one_begin(order: str, faults: int) -> None:
    words = {"ld": "ld.global.b32", "st": "st.global.b32", "wait": "griddepcontrol.wait;"}
    words["next"] = "griddepcontrol.launch_dependents;"
    assert out_of_turn("\n".join(words[word] for word in order.split())) == faults
