"""Compiles the Triton kernels for a chip that need not be here, and says what the compiler made of them.

    python -m agentspeed_kernels.triton.compiled cuda:90

One JSON line a kernel: registers, spilled bytes, shared memory, and how many matrix and bulk-copy instructions. What
was only compiled was not run: numbers are checked by the interpreter, speed by bench/gpu.py on the chip.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, final

from agentspeed_kernels.triton.builds import Build, builds

_WAIT, _NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFacts:
    """What one compilation gave; -1 where the target's tools do not tell."""

    name: str
    target: str
    registers: int
    spilled: int
    """Bytes of local memory a thread uses."""
    shared: int
    """Bytes of shared memory a program uses."""
    matrix: dict[str, int]
    """Matrix instructions by kind: wgmma, mma, tcgen05, mfma."""
    bulk_copies: int
    waits: int
    """Places where a launch that began early waits for the one before it."""
    out_of_turn: int
    """Writes, and permissions for the next launch to begin, that stand before a wait."""
    seconds: float


def compile_one(build: Build, target: str) -> CompiledFacts:
    """Compiles for `cuda:90`, `cuda:100` or `hip:gfx950`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    vendor, _, arch = target.partition(":")
    chip = GPUTarget(vendor, int(arch) if vendor == "cuda" else arch, 32 if vendor == "cuda" else 64)
    source_of: Any = ASTSource
    if build.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    names = build.function.arg_names
    signature = {name: "constexpr" if name in build.constants else build.signature[name] for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    started = time.perf_counter()
    made = triton.compile(
        source_of(fn=build.function, signature=signature, constexprs=build.constants, attrs=divisible),
        target=chip,
        options=build.options,
    )
    text = made.asm["ptx"] if vendor == "cuda" else made.asm["amdgcn"]
    registers, spilled = _resources(made.asm["cubin"]) if vendor == "cuda" else _amd_resources(text)
    kinds = {"wgmma": r"wgmma\.mma_async", "mma": r"\smma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma"}
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in kinds.items()}
    return CompiledFacts(
        name=build.name,
        target=target,
        registers=registers,
        spilled=spilled,
        shared=int(made.metadata.shared),
        matrix={kind: count for kind, count in counts.items() if count},
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", text)),
        waits=text.count(_WAIT),
        out_of_turn=out_of_turn(text),
        seconds=round(time.perf_counter() - started, 1),
    )


def out_of_turn(text: str) -> int:
    """Of PTX that waits: stores before its first wait, and permissions whose last wait belongs to another one."""
    if _WAIT not in text and _NEXT not in text:
        return 0
    stores = len(re.findall(r"\bst\.global", text.split(_WAIT, 1)[0]))
    order: list[str] = re.findall("|".join(map(re.escape, (_WAIT, _NEXT))), text)
    return stores + sum(before != _WAIT for before, this in pairwise([_NEXT, *order]) if this == _NEXT)


def _resources(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) as `cuobjdump` of the Triton wheel reads them from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def _amd_resources(text: str) -> tuple[int, int]:
    found = {key: re.search(rf"\.{key}:\s*(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
    registers, spilled = found["vgpr_count"], found["vgpr_spill_count"]
    return (int(registers[1]) if registers else -1, 4 * int(spilled[1]) if spilled else -1)


def main(target: str) -> None:
    for build in builds(target):
        print(json.dumps(asdict(compile_one(build, target))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
