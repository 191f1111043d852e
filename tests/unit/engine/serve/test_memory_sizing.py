"""A pool is sized for the memory that the process may use; weights that cannot fit are refused before any is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.serve import sizing
from agentspeed_engine.serve.memory_limit import MemoryLimit, memory_limit
from agentspeed_engine.serve.options import EngineOptions, build
from agentspeed_engine.serve.sizing import sizes
from tests.support.paged import CONFIG

GB = 10**9
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUPS: dict[str, tuple[dict[str, str], int]] = {
    "none": ({}, MACHINE),
    "version 2, the container's own root": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "123456\n"}, 123456),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, MACHINE),
    "version 2, a group around counts": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": "777"},
        777),
    "version 2, the least counts": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "500", "sys/fs/cgroup/a/memory.max": "777"},
        500),
    "version 1, a path of the host": (
        {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "4242\n"}, 4242),
    "version 1, no limit": (
        {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        MACHINE),
    "both, as systemd mixes them": (
        {"proc/self/cgroup": "4:memory:/a\n0::/b\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "900",
         "sys/fs/cgroup/b/memory.max": "800"}, 800),
    "unreadable": ({"proc/self/cgroup": "nonsense\n\n7\n", "sys/fs/cgroup/memory.max": "what"}, MACHINE),
}  # fmt: skip


@pytest.mark.parametrize(("contents", "wanted"), GROUPS.values(), ids=GROUPS.keys())
def test_the_least_limit_around_the_process_counts(tmp_path: Path, contents: dict[str, str], wanted: int) -> None:
    found = memory_limit(files(tmp_path, contents))
    assert found.bytes == wanted
    assert found.owner == ("the machine" if wanted == MACHINE else "this container")


def options(**given: object) -> EngineOptions:
    return EngineOptions(**({"model": "m", "dtype": "float32"} | given))  # type: ignore[arg-type]


def test_a_default_pool_is_a_quarter_of_what_the_container_may_use() -> None:
    pages, _ = sizes(options(), 10**6, 10**6, 0, MemoryLimit(4 * GB, "this container"))
    assert pages == 1000


def test_a_default_pool_is_less_where_weights_leave_less() -> None:
    memory = MemoryLimit(16 * GB, "this container")
    pages, _ = sizes(options(dtype="bfloat16"), 10**6, 10**6, 7 * GB, memory)
    assert 0 < pages * 10**6 <= 16 * GB - 14 * GB - GB // 1
    assert sizes(options(dtype="bfloat16"), 10**6, 10**6, GB, memory)[0] == 4000


@pytest.mark.parametrize(("dtype", "parameters", "advice"), [
    ("float32", 5 * GB, "dtype='bfloat16', with which they take 10.0 GB"),
    ("float64", 5 * GB, "dtype='bfloat16', with which they take 10.0 GB"),
    ("float64", 3 * GB, "dtype='float32', with which they take 12.0 GB"),
    ("bfloat16", 9 * GB, "weights='int8', with which they take about 9.9 GB"),
    ("float32", 9 * GB, "weights='int8', with which they take about 9.9 GB"),
    ("bfloat16", 20 * GB, "a smaller model"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_dtype_that_would(
    dtype: str, parameters: int, advice: str
) -> None:
    with pytest.raises(EngineFault) as caught:
        sizes(options(dtype=dtype), 4096, 10**6, parameters, MemoryLimit(16 * GB, "this container"))
    assert caught.value.code == "out_of_memory"
    assert "this container has 16.0 GB" in caught.value.message
    assert advice in caught.value.remedy


def test_weights_in_8_bits_are_counted_as_what_they_take() -> None:
    memory = MemoryLimit(16 * GB, "this container")
    with pytest.raises(EngineFault):
        sizes(options(dtype="bfloat16"), 10**6, 10**6, 9 * GB, memory)
    pages, _ = sizes(options(dtype="bfloat16", weights="int8"), 10**6, 10**6, 9 * GB, memory, 9 * GB + 10**8)
    assert pages * 10**6 == 4 * GB
    with pytest.raises(EngineFault, match=r"The weights take 15.5 GB in 8 bits, this container has 16.0 GB"):
        sizes(options(dtype="bfloat16", weights="int8"), 10**6, 10**6, 15 * GB, memory, 15 * GB + GB // 2)


def test_weights_that_would_fill_a_small_memory_are_told_in_numbers_that_differ() -> None:
    with pytest.raises(EngineFault) as caught:
        sizes(options(dtype="bfloat16"), 4096, 10**6, 197 * 10**6, MemoryLimit(400 * 10**6, "this container"))
    assert "take 394 MB in bfloat16, this container has 400 MB, of which 25 MB are for steps" in caught.value.message


def test_a_pool_that_fits_alone_but_not_beside_the_weights_is_refused() -> None:
    with pytest.raises(EngineFault) as caught:
        sizes(options(pages=9000), 4096, 10**6, 2 * GB, MemoryLimit(16 * GB, "the machine"))
    assert caught.value.code == "bad_options"
    assert "9.0 GB beside 8.0 GB of weights, the machine has 16.0 GB" in caught.value.message


@pytest.mark.parametrize(("given", "memory", "said", "remedy"), [
    ({"context_limit": 65536}, 3 * GB, "has 750 pages, and a turn of context_limit 65536 needs 1025 pages",
     "Give pages=1025, which take 1.0 GB, context_limit=47936 or less, a smaller `dtype` or kv_cache_dtype='fp8', or"),
    ({"context_limit": 65536}, GB, "a pool that nobody sized has 250 pages", "Give context_limit=15936 or less, a sm"),
    ({"firm_pages": 900}, 3 * GB, "needs 2 pages (rule L1), beside 900 for firm leases",
     "Give pages=902, which take 902 MB, fewer `firm_pages`, a smaller `dtype`"),
    ({}, 7 * 10**6, "has 1 page, and a turn needs 2 pages", "Give pages=2, which take 2 MB, a smaller `page_tokens`"),
    ({}, 10**6, "has 0 pages, and a turn needs 2 pages", "Give a smaller `page_tokens`, a smaller `dtype` or"),
    ({"pages": 1}, GB, "The pool has 1 page, 0 of them for firm leases, and a turn needs 2", "Give 2 pages or more."),
    ({"pages": 10, "firm_pages": 9}, GB, "9 of them for firm leases", "Give 11 pages or more, or fewer firm pages."),
])  # fmt: skip
def test_a_pool_that_holds_no_turn_is_refused_with_what_its_user_can_do(
    given: dict[str, int], memory: int, said: str, remedy: str
) -> None:
    with pytest.raises(EngineFault) as caught:
        sizes(options(**given), 10**6, 10**6, 0, MemoryLimit(memory, "this container"))
    assert caught.value.code == "bad_options"
    assert said in caught.value.message and caught.value.remedy.startswith(remedy), caught.value


@pytest.mark.parametrize("pages", [2, 3, 4, 5, 9, 100])
@pytest.mark.parametrize("context_limit", [None, 64])
def test_a_default_pool_that_is_not_refused_starts(pages: int, context_limit: int | None) -> None:
    given = options(context_limit=context_limit)
    found, limit = sizes(given, 10**6, 10**6, 0, MemoryLimit(4 * pages * 10**6, "this container"))
    assert found == pages
    CoreConfig(pages=found, context_limit=limit, vocab_size=9, model="m", page_tokens=given.page_tokens).check()


def test_a_model_too_large_for_the_memory_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(sizing, "memory_limit", lambda: MemoryLimit(100_000, "this container"))
    with pytest.raises(EngineFault) as caught:
        build(EngineOptions(model=str(tmp_path)))
    assert caught.value.code == "out_of_memory"
