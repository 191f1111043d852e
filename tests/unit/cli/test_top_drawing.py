"""What `agentspeed top` draws of a picture: names, trees, counts of what is left out, within 100 columns."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
from rich.console import Console

from agentspeed.cli.top_rendering import Frame, as_data, drawn, left_out, rows_of, shares
from agentspeed.transport.base import wire

WELCOME = wire.Welcome(
    request=1,
    protocol=1,
    engine="agentspeed",
    model="nano",
    vocab_size=512,
    context_limit=4096,
    page_tokens=16,
    pages=100,
    host_slots=20,
    pid=77,
    limits={},
    source="/models/nano",
)
STATES = ("held", "queued", "promoting", "prefilling", "decoding", "settling")


def branch(number: int, parent: int | None = None, state: str = "Held", **facts: object) -> wire.BranchView:
    chosen: dict[str, object] = {
        "known": 320,
        "places": wire.Places(device=200, both=100, host=19, lost=1),
        "lease": None,
        "tool": "",
        "tail_pages": 0,
        "age": None,
        "drawn": 0,
        "since": 2.0,
        "waiting_for": "",
    } | facts
    return wire.BranchView(branch=number, parent=parent, state=state, **chosen)  # type: ignore[arg-type]


def picture(*sessions: wire.SessionView, clock: float = 50.0, **counts: int) -> wire.Picture:
    chosen = (
        dict.fromkeys(STATES, 0)
        | {
            "sessions": len(sessions),
            "branches": sum(session.branches_total for session in sessions),
            "preemptions": 0,
            "tickets": 0,
            "firm_pages": 4,
            "firm_budget": 10,
            "steps": 100,
            "tokens_drawn": 1000,
        }
        | counts
    )
    pages = {"free": 30, "tails": 10, "loading": 0, "pinned": 20, "held": 25, "cached": 15, "unsorted": 0}
    return wire.Picture(
        request=1, clock=clock, sessions=sessions, pages=pages, slots={"total": 20, "free": 12}, counts=chosen
    )


def session(
    *branches: wire.BranchView, number: int = 1, tenant: str = "", total: int | None = None
) -> wire.SessionView:
    return wire.SessionView(session=number, tenant=tenant, branches=branches, branches_total=total or len(branches))


def text_of(frame: Frame, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(drawn(frame, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_branches_stand_below_the_branch_they_were_forked_from() -> None:
    rows = rows_of(picture(session(branch(1), branch(2, 1), branch(3, 1), branch(4, 2), tenant="acme")))
    assert [row.name for row in rows] == ["session 1 acme", "├ 2", "│ └ 4", "└ 3"]


def test_a_session_is_shown_by_what_its_program_calls_it_too() -> None:
    named = msgspec.structs.replace(session(branch(1), branch(2, 1), tenant="acme"), label="8d8935cc")
    assert [row.name for row in rows_of(picture(named))] == ["session 1 8d8935cc acme", "└ 2"]
    for width in (80, 100, 120):
        assert "session 1 8d8935cc" in text_of(Frame("s", WELCOME, picture(named)), width)


def test_with_a_quota_the_pages_of_each_tenant_are_shown_fullest_first() -> None:
    shown = picture(session(branch(1), tenant="acme"), session(branch(2), number=2))
    assert "by tenant" not in text_of(Frame("s", WELCOME, shown))
    shown = msgspec.structs.replace(shown, tenants={"acme": 3, "": 12}, tenant_quota=40)
    assert "pages by tenant, of 40 each: no name 12  acme 3" in text_of(Frame("s", WELCOME, shown))


def test_names_that_clients_chose_cannot_command_the_terminal_or_break_a_line() -> None:
    hostile = "t\x1b[2J\x1b]0;owned\x1b\\\u202e\nz"
    named = msgspec.structs.replace(session(branch(1, tool=hostile), tenant=hostile), label="a\rb")
    shown = picture(named)
    (row,) = rows_of(shown)
    assert row.name == "session 1 a\\rb t\\x1b[2J\\x1b]0;owned\\x1b\\\\u202e\\nz" and row.note.endswith("\\u202e\\nz")
    calm = text_of(Frame("s", WELCOME, picture(session(branch(1, tool="t"), tenant="t"))), 200)
    quota = {"tenants": {hostile: 3}, "tenant_quota": 4}
    welcome = msgspec.structs.replace(WELCOME, model=hostile)
    text = text_of(Frame("s", welcome, msgspec.structs.replace(shown, **quota)), 200)
    assert "\x1b" not in text and "\u202e" not in text
    assert len(text.splitlines()) == len(calm.splitlines()) + 1  # the pages by tenant


def test_children_whose_parent_is_closed_stand_below_their_session() -> None:
    rows = rows_of(picture(session(branch(5), branch(6, 5), number=1)))
    assert [row.name for row in rows] == ["session 1", "└ 5", "  └ 6"]


def test_what_is_left_out_is_counted() -> None:
    shown = picture(session(branch(1), branch(2, 1), total=9), sessions=4, branches=29)
    assert [row.name for row in rows_of(shown)] == ["session 1", "├ 2", "└ + 7 more"]
    assert left_out(shown) == "+ 3 sessions with 20 branches more"
    assert left_out(picture()) == "no sessions"


def test_a_row_says_where_the_rows_are_and_how_long_the_lease_lasts() -> None:
    lease = wire.Lease(keep="firm", until=62.5, seconds=30.0, residence=wire.Residence(), why="")
    (row,) = rows_of(picture(session(branch(1, lease=lease, tool="search"))))
    assert (row.rows, row.lease, row.note) == ("device 200 both 100 host 19", "firm 12.5s", "rests 2.0s for search")
    (row,) = rows_of(picture(session(branch(1, lease=lease)), clock=63.0))
    assert row.lease == "firm over"


def test_the_one_token_that_is_always_fed_last_does_not_count_as_lost() -> None:
    (row,) = rows_of(picture(session(branch(1, places=wire.Places(device=317, lost=3)))))
    assert row.rows == "device 317 lost 3"
    (row,) = rows_of(picture(session(branch(1, places=wire.Places(device=319, lost=1)))))
    assert row.rows == "device 319"


def test_a_frame_of_a_busy_engine_fits_into_100_columns() -> None:
    waiting = branch(3, 1, "Queued", age=7, waiting_for="branch 2's prefix", known=1_048_576)
    text = text_of(
        Frame(
            "/run/engine.sock",
            WELCOME,
            picture(
                session(branch(1), branch(2, 1, "Decoding", drawn=12, tail_pages=11), waiting),
                queued=1,
                decoding=1,
                held=1,
            ),
        )
    )
    assert all(len(line) <= 100 for line in text.splitlines())
    joined = " ".join(text.split())
    for words in (
        "nano process 77",
        "1 session, 3 branches: 1 held, 1 queued, 1 decoding",
        "queue, oldest first: 3",
        "12 drawn",
        "firm leases 4 of 10 pages",
        "host 8 of 20",
        "30 free",
        "waits for branch 2's prefix",
    ):
        assert words in joined, text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_every_branch_has_one_line_whatever_the_width(width: int) -> None:
    lease = wire.Lease(keep="firm", until=109.5, seconds=59.0, residence=wire.Residence(), why="")
    spread = wire.Places(device=100_000, both=200_000, host=300_000, loading=4_000, lost=5_000)
    rows = [
        branch(
            number,
            1 if number > 1 else None,
            "Queued",
            lease=lease,
            places=spread,
            known=609_000,
            age=number,
            waiting_for=f"room after branch {number - 1}",
        )
        for number in range(1, 9)
    ]
    text = text_of(Frame("s", WELCOME, picture(session(*rows, tenant="a-tenant-with-a-long-name"), queued=8)), width)
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    head = next(number for number, line in enumerate(lines) if line.startswith("branch"))
    assert ["waits" in line for line in lines[head + 1 : head + 9]] == [True] * 8, text
    assert "609000" in text and "firm 59.5s" in text if width >= 100 else True


def test_a_screen_is_shared_by_need() -> None:
    assert shares([5, 50, 50], 45) == [5, 20, 20]
    assert shares([50, 5], 100) == [50, 5]
    assert shares([9, 9], -3) == [0, 0]
    assert shares([], 10) == []


def test_the_bar_of_pages_has_the_same_length_whatever_is_rounded() -> None:
    line = text_of(Frame("s", WELCOME, picture())).splitlines()[2]
    assert sum(line.count(mark) for mark in "█▓▒░") == 24
    assert line.startswith("100 pages")


def test_rates_come_from_two_pictures() -> None:
    before = picture(clock=50.0)
    now = picture(clock=52.0, steps=180, tokens_drawn=1300)
    assert "40 steps/s  150 tokens/s" in text_of(Frame("s", WELCOME, now, before))
    assert "100 steps  1000 tokens drawn" in text_of(Frame("s", WELCOME, before))


def test_an_engine_that_does_not_answer_is_marked_where_the_title_is_never_cut() -> None:
    text = text_of(Frame("s", WELCOME, picture(session(branch(1)), held=1), silent=12.3), 60)
    assert text.splitlines()[0].startswith("nano  process 77  has not answered for 12 s")


def test_programs_get_every_value_by_name() -> None:
    lease = wire.Lease(keep="soft", until=51.0, seconds=9.0, residence=wire.Residence(device=320), why="asked")
    data = json.loads(json.dumps(as_data(Frame("s", WELCOME, picture(session(branch(1, lease=lease)))))))
    (shown,) = data["sessions"][0]["branches"]
    assert shown["lease"] == {
        "keep": "soft",
        "until": 51.0,
        "seconds": 9.0,
        "why": "asked",
        "residence": {"device": 320, "host": 0, "lost": 0},
    }
    assert shown["places"]["both"] == 100
    assert (data["pid"], data["source"], data["pages"]["cached"]) == (77, "/models/nano", 15)


def test_every_rank_of_a_model_has_a_line_with_what_it_waited() -> None:
    def at(clock: float, waited: float) -> wire.Picture:
        second = wire.RankView(rank=1, pid=42, memory=2_000_000_000, waited=waited)
        first = wire.RankView(rank=0, pid=41, memory=1_000_000_000, waited=None)
        return msgspec.structs.replace(picture(clock=clock), ranks=(first, second))

    frame = Frame("x.sock", WELCOME, at(52.0, 3.5), at(50.0, 3.0))
    lines = text_of(frame).splitlines()
    assert "rank 0  process 41  1.0 GB" in lines
    assert "rank 1  process 42  2.0 GB  waits for others 25% of the time" in lines
    assert as_data(frame)["ranks"][1] == {"rank": 1, "pid": 42, "memory": 2_000_000_000, "waited": 3.5, "dp": 0}


def test_every_scheduler_of_an_engine_with_several_has_a_line_and_its_ranks_name_it() -> None:
    one = picture()
    other = msgspec.structs.replace(one, counts=one.counts | {"sessions": 1, "queued": 0, "decoding": 2})
    views = tuple(wire.DpView(pages=seen.pages, slots=seen.slots, counts=seen.counts) for seen in (one, other))
    ranks = tuple(wire.RankView(rank=number, pid=41 + number, memory=10**9, dp=number) for number in range(2))
    lines = text_of(Frame("x.sock", WELCOME, msgspec.structs.replace(one, ranks=ranks, dp=views))).splitlines()
    free = f"{one.pages['free'] + one.pages['cached']} of {sum(one.pages.values())} pages free or cached"
    assert "rank 1  dp 1  process 42  1.0 GB" in lines
    assert any(line.startswith("dp 1  1 session: ") and "2 decoding" in line and line.endswith(free) for line in lines)
