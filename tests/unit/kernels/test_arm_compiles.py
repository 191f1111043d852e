"""The sources for 64-bit ARM compile without a warning, where a compiler for it is at hand."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentspeed_kernels.cpu import native

SOURCES = sorted(Path(native.__file__).parent.glob("native_*.c"))
GCC = "aarch64-linux-gnu-gcc"
STRICT = ("-Wall", "-Wextra", "-Werror")
ZIG_LACKS = ("-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-but-set-parameter")
"""It comes without OpenMP, for which these parameters are."""


def compiler() -> list[str] | None:
    if found := shutil.which(GCC):
        return [found, *native.FLAGS, *STRICT]
    if importlib.util.find_spec("ziglang"):
        flags = [flag for flag in native.FLAGS if flag != "-fopenmp"]
        return [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu", *flags, *STRICT, *ZIG_LACKS]
    return None


@pytest.mark.parametrize("kind", native.NEON.kinds)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_compiles_for_arm_without_a_warning(source: Path, kind: native.Kind, tmp_path: Path) -> None:
    found = compiler()
    if found is None:
        pytest.skip(f"neither {GCC} nor the package ziglang is here (pip install ziglang)")
    named = ["-DFORM=neon", f"-DKIND={kind}", *(["-DHALF"] if kind == "bf16" else [])]
    command = [*found, *native.NEON.flags, *named, "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "made.o")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
