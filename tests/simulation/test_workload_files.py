"""A workload file that is wrong is refused, with the file, the key and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.simulation.__main__ import main
from tests.simulation.mutants import without_settling
from tests.simulation.runner import run_seeds
from tests.simulation.workload import FAULT_KINDS, Span, WorkloadError, load, names, parsed

GOOD = """
name = "good"
why = "A test."

[engine]
pages = 24
context_limit = 64

[[agents]]
kind = "tool_user"
pause = 0.5

[[faults]]
kind = "abort"
rate = 0.1
"""


def test_a_number_is_a_span_of_itself() -> None:
    workload = parsed(GOOD, "good.toml")
    assert workload.agents[0].pause == Span(0.5, 0.5)
    assert workload.engine.config().pages == 24


@pytest.mark.parametrize(
    ("old", "new", "key", "remedy"),
    [
        ("pages = 24", "page = 24", "engine.page", "Do you mean 'pages'?"),
        ("pages = 24", "pages = 'many'", "engine.pages", "Give: int"),
        ("pages = 24", "pages = 4", "engine", "Give more pages"),
        ("pages = 24\n", "", "engine.pages", "Add it"),
        ("pages = 24", "pages = 24\npolicy = 'chance'", "engine", "One of: "),
        ("pages = 24", "pages = 24\npolicy = 'pin'", "engine.policy", "One of: next_use"),
        ("[engine]", "[engin]", "engin", "Do you mean 'engine'?"),
        ("pause = 0.5", "pause = [3, 1]", "agents[0].pause", "0 <= low <= high"),
        ("pause = 0.5", "pause = [1, 2, 3]", "agents[0].pause", "[low, high]"),
        ("pause = 0.5", "live = 1", "agents[0].live", "Give: bool"),
        ("pause = 0.5", "keep = 'hard'", "agents[0].keep", "One of: none, soft, firm"),
        ('kind = "tool_user"', 'kind = "tool"', "agents[0].kind", "One of: tool_user"),
        ('kind = "abort"', 'kind = "aborts"', "faults[0].kind", "One of: abort"),
        ("rate = 0.1", "rate = 2", "faults[0].rate", "Give 0 to 1"),
        ("rate = 0.1", "at = 3", "faults[0].at", "Give: tuple"),
        ("rate = 0.1", "rate = 0.1\nat = [3]", "faults[0].at", "another [[faults]] table"),
        ("rate = 0.1", "most = -1", "faults[0].most", "Give 0 or more"),
        ('why = "A test."', 'why = "A test."\nfaults = 3', "(syntax)", "Correct that line"),
        ('why = "A test."', 'why = "A test."\nexpect = 3', "expect", "Write [expect]"),
        ("rate = 0.1", 'rate = 0.1\n[expect]\nmarks = ["x"]', "expect.marks[0]", "One of: preempted"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(old: str, new: str, key: str, remedy: str) -> None:
    assert old in GOOD
    with pytest.raises(WorkloadError) as refused:
        _ = parsed(GOOD.replace(old, new, 1), "bad.toml")
    assert refused.value.key == key
    assert remedy in refused.value.remedy
    assert str(refused.value).startswith(f"bad.toml: {key}: ")


def test_the_workload_of_the_documentation_runs_and_reaches_what_it_promises() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "simulate.md"
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    report = run_seeds(parsed(text, "night.toml"), range(4))
    assert not report.failures, str(report.failures[0])
    assert not report.never_hit() and not report.never_struck()


def test_every_workload_and_fault_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "simulate.md").read_text(encoding="utf-8")
    assert [name for name in (*names(), *FAULT_KINDS) if f"`{name}`" not in page] == []


def test_an_unknown_workload_is_answered_with_those_there_are() -> None:
    with pytest.raises(WorkloadError, match=r"sub-agents"):
        _ = load("no-such-thing")


def test_the_command_runs_a_file_and_counts_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    assert main([str(path), "--seeds", "2", "--marks"]) == 0
    said = capsys.readouterr().out
    assert "good" in said and "2 seeds" in said and "abort" in said
    assert "marks hit; never: " in said


def test_the_command_refuses_a_bad_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.toml"]) == 2
    assert "nowhere.toml: (file)" in capsys.readouterr().err


def test_a_file_in_another_encoding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.toml"
    path.write_text(GOOD.replace("A test", "Être"), encoding="latin-1")
    assert main([str(path)]) == 2
    assert "latin.toml: (file): This is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-1", "x"])
def test_a_run_of_no_seeds_is_refused(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        _ = main(["tiny", "--seeds", seeds])
    assert refused.value.code == 2
    assert "is no whole number above 0" in capsys.readouterr().err


def test_marks_are_counted_when_asked_for_and_not_after_a_single_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    assert main([str(path), "--seeds", "1"]) == 0
    assert "marks hit" not in capsys.readouterr().out


def test_a_failing_file_is_run_again_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Path(__file__).parent / "workloads" / "abort-while-finishing.toml"
    path = tmp_path / "my own.toml"
    path.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    with without_settling():
        assert main([str(path), "--seed", "3", "--seeds", "5"]) == 1
    assert f"again: python -m tests.simulation '{path}' --seed 3 --seeds 1" in capsys.readouterr().out


def test_a_failure_shows_its_seed_and_the_last_events(capsys: pytest.CaptureFixture[str]) -> None:
    with without_settling():
        assert main(["abort-while-finishing", "--seed", "3", "--seeds", "5"]) == 1
    said = capsys.readouterr().out
    assert "FAILED: abort-while-finishing --seed 3: ledger: (4)" in said
    assert "Cancel" in said, "the last events are shown"
    assert "again: python -m tests.simulation abort-while-finishing --seed 3 --seeds 1" in said


def test_a_mark_that_no_seed_reached_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + '\n[expect]\nmarks = ["prefetched"]\n', encoding="utf-8")
    assert main([str(path), "--seeds", "1"]) == 1
    assert "never reached: prefetched" in capsys.readouterr().out


def test_a_fault_can_be_put_at_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace("pause = 0.5", "pause = 0.5\nturns = 1\ndrawn = 1"), encoding="utf-8")
    assert main([str(path), "--every", "abort"]) == 0
    assert "points, 0 failed" in capsys.readouterr().out
