"""A public class has a name of its own, or shares it with another for a reason that is written here."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("agentspeed", "engine/agentspeed_engine", "kernels/agentspeed_kernels")
_TWO_SIDES = "one concept on two sides: what users hold, and what the engine or the protocol has of it"
_TWO_FIELDS = "the word of two fields that have nothing to do with each other; no module imports both"
SHARED = {
    "AgentSpeedModel": "the model of two frameworks, each under the framework's own naming",
    "Branch": _TWO_SIDES,
    "Call": _TWO_FIELDS,
    "Candidate": _TWO_FIELDS,
    "Checkpoint": _TWO_FIELDS,
    "Choice": _TWO_FIELDS,
    "Copied": "the end of a host copy: as the copier reports it, and as a recording keeps it",
    "Cost": _TWO_FIELDS,
    "Draws": "the random inputs of a family of ops, each beside the cases of its family",
    "EngineOptions": _TWO_SIDES,
    "Experts": "an op of the kernels, and the module of a model that calls it",
    "Form": _TWO_FIELDS,
    "Generate": "a step of the agent loop, and the command that carries it out",
    "Layout": _TWO_FIELDS,
    "Lease": _TWO_SIDES,
    "LeaseChanged": _TWO_SIDES,
    "Limits": "the most that something may have: a run's turns, the sessions that wait for their conversations",
    "Linear": _TWO_FIELDS,
    "Log": "the ids of a branch, and a rehearsal of the log that a session writes",
    "Node": _TWO_FIELDS,
    "Opening": "how a log begins, and how a branch is opened on it",
    "Part": _TWO_FIELDS,
    "Pending": _TWO_FIELDS,
    "Place": _TWO_FIELDS,
    "Places": _TWO_FIELDS,
    "Plan": _TWO_FIELDS,
    "Prepared": "the end of a turn's preparation: as the executor reports it, and as a recording keeps it",
    "Residence": _TWO_SIDES,
    "Room": _TWO_FIELDS,
    "Row": _TWO_FIELDS,
    "Run": _TWO_FIELDS,
    "Sampling": _TWO_SIDES,
    "Session": _TWO_SIDES,
    "Span": _TWO_FIELDS,
    "Tape": "a record of what was called, to be run again: of the scheduler's inputs, of a step's kernels",
    "Terms": "a protocol and the class that it is the border of",
    "Turn": _TWO_SIDES,
    "TurnStarted": _TWO_SIDES,
}


def homes() -> dict[str, list[Path]]:
    """The modules that define each public class at their top level."""
    found: dict[str, list[Path]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(path)
    return found


def test_two_public_classes_share_a_name_only_for_a_reason() -> None:
    twice = {name: paths for name, paths in homes().items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in SHARED} == {}
    assert twice.keys() == SHARED.keys()  # none is excused that is not needed any more


def test_no_module_meets_two_classes_of_one_name_that_have_nothing_to_do_with_each_other() -> None:
    apart = {name for name, reason in SHARED.items() if reason is _TWO_FIELDS}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
            imported = [
                alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in set(node.names)
            ]
            met = [name for name in (*defined, *set(imported)) if name in apart]
            assert len(met) == len(set(met)), path
