"""No module reads what another keeps to itself: names with an underscore belong to the file that has them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("agentspeed", "engine/agentspeed_engine", "kernels/agentspeed_kernels")
ALLOWED: dict[tuple[str, str], str] = {
    ("engine/agentspeed_engine/models/memory.py", "_base"): "torch's only name for the tensor that a view keeps",
    ("engine/agentspeed_engine/kv/branch_states.py", "_take"): (
        "`Linear` hands its value to the class of the next state alone: a public verb would let anybody take it"
    ),
    ("engine/agentspeed_engine/kv/node_states.py", "_take"): "as above",
    ("kernels/agentspeed_kernels/cpu/torch_attention.py", "_scaled_dot_product_flash_attention_for_cpu"): (
        "torch's only attention on CPUs that also gives the log-sum-exp"
    ),
    ("kernels/agentspeed_kernels/triton/direct.py", "_BASE_ARGS_FORMAT"): (
        "says whether the launchers of this Triton take the arguments that are known; with others they are not called"
    ),
    ("kernels/agentspeed_kernels/triton/device/rows_fp8_hopper.py", "_reinterpret"): (
        "Gluon's only view of shared memory in another format: a tile is bytes to one product and pairs to the other"
    ),
}
"""Private names that are used all the same, and why there is no other way."""
TESTS = {
    "tests/adapters/test_langgraph_sessions.py": "hears the commands that the scripted engine got",
    "tests/modelcheck/mutants.py": "a mutant replaces one function of the production code",
    "tests/simulation/mutants.py": "as above",
    "tests/property/test_protocol_frames.py": "compares with the plain decoder of the fast one",
    "tests/simulation/test_decode_ahead.py": "switches one rule off, to show that the test would notice",
    "tests/support/weights_held.py": "what a model holds has no outcome but memory",
    "tests/unit/cli/test_cli_commands.py": "stands in for a session that is full",
    "tests/unit/engine/kv/test_kv_log.py": "how deep shared parts lie has no outcome but time and memory",
    "tests/unit/engine/models/test_int8_weights.py": "whether a step was repeated has no outcome but time",
    "tests/unit/engine/models/test_kept_weights.py": "whether a step was repeated has no outcome but time",
    "tests/unit/engine/models/test_step_programs.py": "whether a step was repeated has no outcome but time",
    "tests/unit/engine/sched/test_recorder.py": "breaks the file under the recorder",
    "tests/unit/engine/sched/test_sched_ranking.py": "compares the ranking with a plain sort of all candidates",
    "tests/unit/engine/sched/test_sched_waiting.py": "counts how often a plan asks for a turn",
    "tests/unit/engine/serve/test_run_links.py": "what waits on a link has no outcome but memory",
    "tests/unit/engine/serve/test_rank_losses.py": "a step that waits for a rank when the engine is closed",
    "tests/unit/engine/serve/test_run_thread.py": "brings the loop's thread into states that only a crash does",
    "tests/unit/kernels/test_amx_in_software.py": "opens a library in which the tile unit is software",
    "tests/unit/kernels/test_kernels_select.py": "takes the compiler away",
    "tests/unit/sdk/search/test_search_failures.py": "breaks the scripted engine",
    "tests/unit/sdk/search/test_search_input.py": "hears the commands that the scripted engine got",
    "tests/unit/sdk/test_delegation.py": "hears the commands that the scripted engine got",
    "tests/unit/sdk/test_history_reasoning.py": "looks at the log's hidden texts, which nothing shows",
    "tests/unit/sdk/testing/test_testing_scripted.py": "waits for the scripted engine's thread",
}
"""Tests that look inside, and what for. All others see what users see."""
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
"""Of named tuples, whose fields' names they may not take."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in PUBLIC


def own_names(tree: ast.Module) -> set[str]:
    """Private names that the file defines: functions, classes, variables, attributes, fields, slots."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
                names |= {
                    item.value
                    for item in ast.walk(value)
                    if isinstance(item, ast.Constant) and isinstance(item.value, str)
                }
            case _:
                pass
    return {name for name in names if is_private(name)}


def foreign_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name that the file uses and does not define."""
    own = own_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    yield node.lineno, name
            case ast.ImportFrom(names=aliases):
                yield from ((node.lineno, alias.name) for alias in aliases if is_private(alias.name))
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ) if is_private(name):
                if name not in own:
                    yield node.lineno, name
            case ast.Subscript(value=ast.Call(func=ast.Name(id="vars")), slice=ast.Constant(value=str(name))):
                if is_private(name):
                    yield node.lineno, name
            case _:
                pass


def found(*folders: str) -> list[tuple[str, int, str]]:
    lines: list[tuple[str, int, str]] = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            tree = ast.parse(path.read_text(encoding="utf-8"))
            lines += [(name, line, used) for line, used in foreign_names(tree)]
    return lines


def test_no_module_reads_another_ones_private_names() -> None:
    uses = found(*PACKAGES)
    assert [use for use in uses if (use[0], use[2]) not in ALLOWED] == []
    assert ALLOWED.keys() == {(name, used) for name, _, used in uses}  # none is allowed that is not needed any more


def test_tests_look_inside_only_where_it_is_said_what_for() -> None:
    inside = {name for name, _, _ in found("tests")}
    assert inside - TESTS.keys() == set()
    assert TESTS.keys() == inside  # none is excused that is not needed any more


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import a\na.b._c", [(2, "_c")]),
        ("from a import _b", [(1, "_b")]),
        ("def f(o): return getattr(o, '_c')", [(1, "_c")]),
        ("def f(o): return vars(o)['_Part']", [(1, "_Part")]),
        ("class A:\n    def __init__(self): self._b = 1\n    def eq(self, other): return self._b == other._b", []),
        ("class A:\n    __slots__ = ('_b',)\ndef f(a): return a._b", []),
        ("_ = [x for _, x in y]", []),
    ],
)
def test_the_check_sees_each_way_in_and_no_more(source: str, seen: list[tuple[int, str]]) -> None:
    assert list(foreign_names(ast.parse(source))) == seen
