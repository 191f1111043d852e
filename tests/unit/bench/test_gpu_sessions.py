"""What bench/gpu_sessions.py reads from a verbose run of pytest."""

from __future__ import annotations

from bench.gpu_sessions import outcomes

OUTPUT = """
============================= test session starts ==============================
tests/a.py::test_one[cuda-a name with blanks] PASSED                      [ 25%]
tests/a.py::test_two FAILED                                               [ 50%]
tests/a.py::test_three SKIPPED (no GPU can be used here)                  [ 75%]
tests/a.py::test_four ERROR                                               [100%]
=========================== short test summary info ============================
FAILED tests/a.py::test_two - AssertionError: 3 is not 4
ERROR tests/a.py::test_four - RuntimeError: the engine did not start
"""


def test_each_test_has_a_line_with_its_outcome_and_a_failure_its_reason() -> None:
    assert [one.line for one in outcomes(OUTPUT)] == [
        "passed   tests/a.py::test_one[cuda-a name with blanks]",
        "FAILED   tests/a.py::test_two: AssertionError: 3 is not 4",
        "skipped  tests/a.py::test_three",
        "FAILED   tests/a.py::test_four: RuntimeError: the engine did not start",
    ]


def test_what_broke_before_it_could_run_is_a_failure_and_not_forgotten() -> None:
    (one,) = outcomes("ERROR tests/a.py::collection - ImportError: no module")
    assert one.line == "FAILED   tests/a.py::collection: ImportError: no module"
