"""Builds the C kernels once a machine and opens them, or says why it cannot.

One library holds every form of the kernels for this architecture; which of them run is asked of the processor in each
process, so a library in a container or on a shared disk is right on every machine. It goes to the user's cache folder
under a name that hashes the sources, the compiler and its flags: a change of any of them builds anew.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import torch

log = logging.getLogger("agentspeed.kernels")

FEATURE = "native-c"
SWITCH = "AGENTSPEED_NATIVE"
"""Set to 0, the C kernels are neither built nor used. Set to the name of a form, no form above it is used."""
BUILD_TIMEOUT_SECONDS = 120
FLAGS = (
    "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")

Kind = Literal["f32", "bf16"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The kernels written for one class of processors."""

    name: str
    bit: int
    """In the answer of `agentspeed_forms` (native_forms.c); 0: any processor."""
    machines: tuple[str, ...]
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    """Patterns of the files that are compiled for it, once a kind."""
    kinds: tuple[Kind, ...]
    wants: str

    @property
    def feature(self) -> str:
        return f"native-{self.name}"


_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
AMX = Form(
    name="amx",
    bit=4,
    machines=_X86,
    flags=(*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    sources=("amx_*.c", "many_*.c"),
    kinds=("bf16",),
    wants="AMX-BF16 and AMX-INT8",
)
AVX512BF16 = Form(
    name="avx512bf16",
    bit=32,
    machines=_X86,
    flags=(*_AVX512, "-mavx512bf16", "-DVECTOR_TILES"),
    sources=("amx_linear.c", "amx_experts.c", "amx_fp8.c", "amx_attention.c", "many_*.c", "vector_*.c"),
    kinds=("bf16",),
    wants="AVX512-BF16",
)
"""The ops of the kernels for tiles, on vectors: their products are those of vector_products.h."""
AVX512 = Form(
    name="avx512",
    bit=2,
    machines=_X86,
    flags=_AVX512,
    sources=("native_*.c",),
    kinds=("f32", "bf16"),
    wants="AVX-512 F, BW, DQ and VL",
)
AVX2 = Form(
    name="avx2",
    bit=1,
    machines=_X86,
    flags=_AVX2,
    sources=("native_*.c",),
    kinds=("f32", "bf16"),
    wants="AVX2, FMA and F16C",
)
NEON = Form(
    name="neon", bit=8, machines=_ARM, flags=(), sources=("native_*.c",), kinds=("f32", "bf16"), wants="a 64-bit ARM"
)
FORMS = (AMX, AVX512BF16, AVX512, AVX2, NEON)
"""From the fastest on; of two that run, the first is preferred."""
_AMX_REFUSED = 16
_ALWAYS = frozenset({"native_forms.c", "native_scratch.c", "native_run.c", "native_group.c"})
"""Compiled once, for any processor of the architecture."""

P, L, N, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
Arguments = dict[str, tuple[Any, ...]]
_BYTES: Arguments = {
    "linear_bytes": (P, L, P, P, L, P, P, L, P, L, L, L, N),
    "experts_bytes": (P, P, P, P, P, L, P, P, P, P, P, P, P, L, L, L, L, L, N),
}
"""Of weights in int8."""
_FP8: Arguments = {
    "linear_fp8": (P, L, P, P, P, P, L, L, L, L, N),
    "experts_fp8": (P, P, P, P, P, P, P, P, P, P, P, L, L, L, L, L, N),
}
_ROWS: Arguments = {
    "copy": (P, L, L, P, L, L, L, L, L),
    "add": (P, P, L),
    "own": (P, P, L, L, L),
    "read": (P, L, P, N),
    "rms_norm": (P, L, P, F, P, L, L, L, N),
    "add_rms_norm": (P, P, P, F, P, L, L, N),
    "rope": (P, L, L, P, P, N, L, L, L, N),
    "latent_append": (P, L, P, F, P, P, N, P, P, L, L, L, N, N),
    "qkv_append": (P, L, L, P, P, F, P, P, N, P, P, P, P, L, L, L, L, N, N),
    "route": (P, P, P, P, P, L, L, L, L, L, L, N, N, N, F, N),
}
_PLANNED = (L, P, P, P, P, P, P, P, L, P, P, P, F, P, L, P, N, N)
_ATTENTION: Arguments = {
    "mla_rows": (P, L, L, P, L, L, L, L, *_PLANNED),
    "gqa_rows": (P, L, L, P, P, L, L, L, L, *_PLANNED),
}
_PRODUCTS: Arguments = {"linear": (P, L, P, P, P, L, L, L, L, N), "heads_linear": (P, L, L, P, P, L, L, L, L, L, L, N)}
_EXPERTS: Arguments = {"experts": (P, P, P, P, P, P, P, P, P, P, L, L, L, L, L, N)}
_PLAIN: Arguments = _BYTES | _FP8 | _ROWS | _ATTENTION | _PRODUCTS | _EXPERTS
WIDENED = "_16"
"""What follows the name of a product of float32 rows whose weights are in bfloat16."""
_WIDENED: Arguments = {op + WIDENED: types for op, types in (_PRODUCTS | _EXPERTS).items()}
_EXTEND: Arguments = {
    "take_back": (P, L, L, L, P, L, L, P, N),
    "soften": (P, P, F, P, P, L, L, L, N),
    "merge": (P, P, P, P, P, P, P, L, L, L, N),
    "normalise": (P, P, P, P, L, L, L, N),
}
_TILES: Arguments = (
    _ATTENTION
    | _PRODUCTS
    | {
        "experts": (P, P, P, P, P, P, P, P, P, P, P, L, L, L, L, L, N),
        "mla_extend": (P, L, L, P, L, L, P, P, L, L, L, L, L, L, L, P, P, P, P, P, P, P, L, P, F, P, N, N),
        "gqa_extend": (P, L, L, P, P, L, L, L, L, L, L, P, P, P, P, P, P, P, L, P, F, P, N, N),
    }
)


def forms_here() -> tuple[Form, ...]:
    """Those written for this architecture, whether or not this very processor can run them."""
    return tuple(form for form in FORMS if platform.machine() in form.machines)


def arguments(form: Form, kind: Kind) -> Arguments:
    """The C functions of a form in one kind of number: name to argument types."""
    if form in (AMX, AVX512BF16):
        return _BYTES | _FP8 | _TILES
    return _PLAIN | _EXTEND | _WIDENED if kind == "f32" else _PLAIN


def entries_source(form: Form) -> str:
    """C for calling the functions of a form with arguments from memory, which is how a recorded step calls them."""
    lines = ['#include "native_run.h"']
    member = {P: "p", L: "l", N: "i", F: "f"}
    spelled = {P: "void *", L: "long", N: "int", F: "float"}
    for kind in form.kinds:
        for op, types in arguments(form, kind).items():
            name = f"agentspeed_{form.name}_{kind}_{op}"
            given = ", ".join(f"a[{index}].{member[each]}" for index, each in enumerate(types))
            lines.append(f"void {name}({', '.join(spelled[each] for each in types)});")
            lines.append(f"EXPORT void {name}_entry(const argument *a) {{ {name}({given}); }}")
    return "\n".join(lines) + "\n"


@final
@dataclass(frozen=True, slots=True)
class Function:
    """A C function, and the address of what calls it with arguments from memory."""

    call: Any
    types: tuple[Any, ...]
    entry: int


@final
@dataclass(frozen=True, slots=True)
class Unavailable:
    reason: str


@final
class Library:
    """The C functions by form, kind and name: an op, or a step of one."""

    __slots__ = ("_functions", "forms", "lacks", "path", "refused", "run")

    def __init__(self, path: Path, highest: Form | None) -> None:
        """Forms above `highest` are left out."""
        # torch is imported already and brings its libgomp under the same name, so both share one pool of threads. With
        # two pools each would wait for the other's cores.
        assert torch.__version__
        opened = ctypes.CDLL(str(path))
        answer = int(opened.agentspeed_forms())
        self.path = path
        self.run = opened.agentspeed_run
        """(calls, how many): see native_run.h."""
        self.run.argtypes, self.run.restype = (P, L), None
        self.lacks: dict[str, str] = {}
        """Features this processor does not have, with the reason."""
        self.refused: dict[str, str] = {}
        """Features it has and this process may not use."""
        self._functions: dict[tuple[Form, Kind], dict[str, Function]] = {}
        for form in forms_here():
            why = _unusable(form, answer, highest)
            if why is None:
                try:
                    self._functions |= {(form, kind): _opened(opened, form, kind) for kind in form.kinds}
                except AttributeError:
                    self.refused[form.feature] = "the compiler could not build it"
            elif form is AMX and answer & _AMX_REFUSED:
                self.refused[form.feature] = why
            else:
                self.lacks[form.feature] = why
        self.forms = tuple(form for form in forms_here() if (form, form.kinds[0]) in self._functions)

    def functions(self, form: Form, kind: Kind) -> dict[str, Function]:
        return self._functions[(form, kind)]


def _unusable(form: Form, answer: int, highest: Form | None) -> str | None:
    if highest is not None and FORMS.index(form) < FORMS.index(highest):
        return f"{SWITCH} is {highest.name}"
    if form is AMX and answer & _AMX_REFUSED:
        return "the operating system does not let this process use AMX tiles"
    return None if answer & form.bit else f"the processor lacks {form.wants}"


def _opened(opened: ctypes.CDLL, form: Form, kind: Kind) -> dict[str, Function]:
    functions: dict[str, Function] = {}
    for op, types in arguments(form, kind).items():
        call = getattr(opened, f"agentspeed_{form.name}_{kind}_{op}")
        call.argtypes, call.restype = types, None
        entry = ctypes.cast(getattr(opened, f"agentspeed_{form.name}_{kind}_{op}_entry"), P).value
        assert entry is not None
        functions[op] = Function(call, types, entry)
    return functions


@cache
def library() -> Library | Unavailable:
    """The built library of this machine; the answer is kept for the life of the process."""
    asked = os.environ.get(SWITCH)
    if asked == "0":
        return Unavailable(f"switched off by {SWITCH}=0")
    named = {form.name: form for form in FORMS}
    if asked and asked not in named:
        log.warning("%s=%s is neither 0 nor one of %s: it is ignored", SWITCH, asked, ", ".join(named))
    if not forms_here():
        return Unavailable(f"no C kernels are written for {platform.machine()}")
    compiler = _compiler()
    if compiler is None:
        return Unavailable("no C compiler found (tried $CC, gcc, clang, cc)")
    try:
        return Library(_built(compiler), named.get(asked or ""))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Unavailable(f"building with {compiler} failed: {_said(error)}")


def _compiler() -> str | None:
    named = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((found for name in named if name and (found := shutil.which(name))), None)


def _built(compiler: str) -> Path:
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
    target = _cache_folder() / f"kernels-{_key(compiler, sources)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_builder(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if target.exists():  # another process built it meanwhile
            return target
        scratch = Path(folder)
        objects = _compiled(compiler, [path for path in sources if path.suffix == ".c"], scratch)
        made = scratch / target.name
        _run((compiler, "-shared", "-fopenmp", *map(str, objects), "-lm", "-lpthread", "-o", str(made)))
        # Where no lock can be had, each renames a complete file over the other's equal one.
        made.replace(target)
    log.info("built the native kernels: %s", target)
    return target


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Of processes that start together, as ranks do, one builds and the others wait: together they take its cores."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _compiled(compiler: str, sources: Sequence[Path], scratch: Path) -> list[Path]:
    """All objects. A form that fails is left out, with a warning; without any form the first failure is raised."""
    always = [path for path in sources if path.name in _ALWAYS]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:

        def start(source: Path, name: str, *flags: str) -> Callable[[], Path]:
            target = scratch / f"{name}.o"
            running = pool.submit(_run, (compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)))
            return lambda: (running.result(), target)[1]

        base = [start(source, source.stem) for source in always]
        units = {
            form: [
                start(source, f"{source.stem}-{form.name}-{kind}", *form.flags, *_kind_flags(form, kind))
                for kind in form.kinds
                for source in sources
                if any(source.match(pattern) for pattern in form.sources) and source not in always
            ]
            for form in forms_here()
        }
        for form, waiting in units.items():
            entries = scratch / f"entries-{form.name}.c"
            entries.write_text(entries_source(form))
            waiting.append(start(entries, f"entries-{form.name}-all", f"-I{Path(__file__).parent}"))
        objects = [unit() for unit in base]
        failed: list[tuple[Form, subprocess.SubprocessError]] = []
        for form, waiting in units.items():
            try:
                objects += [unit() for unit in waiting]
            except subprocess.SubprocessError as error:
                failed.append((form, error))
    for form, why in failed:
        log.warning("the %s kernels are left out: %s", form.name, _said(why))
    if len(failed) == len(units) and failed:
        raise failed[0][1]
    return [path for path in objects if not any(f"-{form.name}-" in path.name for form, _ in failed)]


def _kind_flags(form: Form, kind: Kind) -> tuple[str, ...]:
    named = (f"-DFORM={form.name}", f"-DKIND={kind}")
    return named if kind == "f32" else (*named, "-DHALF")


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_SECONDS)


def _key(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    flags = [text for form in FORMS for text in (form.name, *form.flags, *form.sources, entries_source(form))]
    digest.update("\0".join((compiler, version, platform.machine(), *FLAGS, *flags)).encode())
    return digest.hexdigest()[:20]


def _cache_folder() -> Path:
    """Raises `OSError` for a user without a home, who named no folder."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "agentspeed"
    try:
        return Path.home() / ".cache" / "agentspeed"
    except RuntimeError as error:
        raise OSError(f"{error} Set XDG_CACHE_HOME to a folder of yours.") from error


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr).strip()[-500:]
    return str(error)
