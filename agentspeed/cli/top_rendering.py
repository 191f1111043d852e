"""How `agentspeed top` draws an engine's picture: pure functions from pictures to rows and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import msgspec
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from agentspeed._base.wording import counted
from agentspeed.cli.terminal_text import printable
from agentspeed.transport.base import wire

_BAR_CELLS = 24
_OWNERS = {
    "pinned": ("█", "green"),
    "tails": ("█", "bright_green"),
    "loading": ("▓", "yellow"),
    "held": ("▓", "cyan"),
    "cached": ("▒", "blue"),
    "unsorted": ("▒", "dim"),
    "free": ("░", "dim"),
}
"""Owners of pages, most needed first, and how their part of the bar looks."""
_STATE_STYLES = {
    "Held": "",
    "Queued": "yellow",
    "Promoting": "magenta",
    "Prefilling": "cyan",
    "Decoding": "green",
    "Settling": "red",
}

_COLUMNS: tuple[tuple[str, JustifyMethod, bool], ...] = (
    ("branch", "left", True),
    ("state", "left", False),
    ("tokens", "right", False),
    ("where its rows are", "left", True),
    ("tail", "right", False),
    ("lease", "left", False),
    ("what it does", "left", True),
)
"""Each with whether it gives way when the screen is narrow: the widest of those first."""
_WIDE = 110
"""Cells from which on there is room for every column."""
_COMMON = 80
"""Cells of the terminal that most programs expect at least."""


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """One engine at one moment; `before` is its last picture, for rates. `silent`: seconds for which it has not
    answered, where that is worth saying; the picture is from before."""

    socket: str
    welcome: wire.Welcome
    picture: wire.Picture
    before: wire.Picture | None = None
    silent: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of branches."""

    name: str
    state: str
    known: str = ""
    rows: str = ""
    tail: str = ""
    lease: str = ""
    note: str = ""


# ---- rows ---------------------------------------------------------------------------------------------------------
def rows_of(picture: wire.Picture) -> list[Row]:
    """Every described branch, children under the branch they were forked from, and how many were left out."""
    return [row for session in picture.sessions for row in _session_rows(session, picture.clock)]


def left_out(picture: wire.Picture) -> str:
    """The sessions of which nothing is shown."""
    rest = picture.counts["sessions"] - len(picture.sessions)
    if rest:
        inside = picture.counts["branches"] - sum(session.branches_total for session in picture.sessions)
        return f"+ {counted(rest, 'session')} with {counted(inside, 'branch', 'branches')} more"
    return "" if picture.sessions else "no sessions"


def _session_rows(session: wire.SessionView, clock: float) -> Iterator[Row]:
    by_number = {view.branch: view for view in session.branches}
    children: dict[int | None, list[wire.BranchView]] = {}
    for view in session.branches:
        parent = view.parent if view.parent in by_number else None
        children.setdefault(parent, []).append(view)
    missing = session.branches_total - len(session.branches)
    tops = children.get(None, [])
    label = " ".join(printable(word) for word in (f"session {session.session}", session.label, session.tenant) if word)
    if len(tops) == 1 and tops[0].branch == session.session:
        yield _row(label, tops[0], clock)
        tops = children.get(tops[0].branch, [])
    else:
        yield Row(label, "")
    yield from _tree(tops, children, "", more=missing > 0, clock=clock)
    if missing:
        yield Row(f"└ + {missing} more", "")


def _tree(
    level: Sequence[wire.BranchView],
    children: dict[int | None, list[wire.BranchView]],
    indent: str,
    *,
    more: bool,
    clock: float,
) -> Iterator[Row]:
    for view in level:
        last = view is level[-1] and not more
        yield _row(f"{indent}{'└' if last else '├'} {view.branch}", view, clock)
        yield from _tree(
            children.get(view.branch, []), children, indent + ("  " if last else "│ "), more=False, clock=clock
        )


def _row(name: str, view: wire.BranchView, clock: float) -> Row:
    return Row(
        name,
        view.state,
        str(view.known),
        _places(view.places),
        str(view.tail_pages or ""),
        _lease(view.lease, clock),
        _note(view),
    )


def _places(places: wire.Places) -> str:
    named = (
        ("device", places.device),
        ("both", places.both),
        ("host", places.host),
        ("loading", places.loading),
        ("lost", places.lost if places.lost > 1 else 0),
    )  # the last known token is never computed before a draw
    return " ".join(f"{name} {tokens}" for name, tokens in named if tokens)


def _lease(lease: wire.Lease | None, clock: float) -> str:
    if lease is None:
        return ""
    if lease.until is None:
        return lease.keep
    left = lease.until - clock
    return f"{lease.keep} {_seconds(left)}" if left > 0 else f"{lease.keep} over"


def _note(view: wire.BranchView) -> str:
    """Why it waits, or what it does."""
    if view.state == "Held":
        return f"rests {_seconds(view.since)}" + (f" for {printable(view.tool)}" if view.tool else "")
    if view.waiting_for:
        return f"waits for {view.waiting_for} ({_seconds(view.since)})"
    return f"{view.drawn} drawn" if view.state == "Decoding" else _seconds(view.since)


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.0f}min" if seconds < 6000 else f"{seconds / 3600:.0f}h"


# ---- the whole ----------------------------------------------------------------------------------------------------
def drawn(frame: Frame, width: int) -> RenderableType:
    """Everything of one engine, on lines of `width` cells: what does not fit is cut, so that a row is a line."""
    picture = frame.picture
    rest = [Text(left_out(picture), style="dim")] if left_out(picture) else []
    table = [_table(picture, width)] if picture.sessions else []
    lines = (
        _title(frame),
        _work(frame),
        *_ranks(frame),
        *_dp(picture),
        _pages(picture),
        *_tenants(picture),
        *_queue(picture),
    )
    return Group(*lines, *table, *rest, "")


def _title(frame: Frame) -> Text:
    welcome, counts = frame.welcome, frame.picture.counts
    text = Text(no_wrap=True, overflow="ellipsis")
    _ = text.append(printable(welcome.model), style="bold").append(f"  process {welcome.pid}", style="dim")
    if frame.silent:
        _ = text.append(f"  has not answered for {frame.silent:.0f} s", style="red")
    _ = text.append(f"  {counted(counts['sessions'], 'session')}, {counted(counts['branches'], 'branch', 'branches')}")
    states = [
        f"{counts[name]} {name}"
        for name in ("held", "queued", "promoting", "prefilling", "decoding", "settling")
        if counts[name]
    ]
    return text.append(f": {', '.join(states)}" if states else "")


def _work(frame: Frame) -> Text:
    now, before = frame.picture, frame.before
    text = Text(no_wrap=True, overflow="ellipsis")
    if before is not None and now.clock > before.clock:
        passed = now.clock - before.clock
        for name, label in (("steps", "steps/s"), ("tokens_drawn", "tokens/s")):
            _ = text.append(f"{(now.counts[name] - before.counts[name]) / passed:.0f} {label}  ")
    else:
        _ = text.append(
            f"{counted(now.counts['steps'], 'step')}  {counted(now.counts['tokens_drawn'], 'token')} drawn  "
        )
    counts = now.counts
    _ = text.append(f"firm leases {counts['firm_pages']} of {counts['firm_budget']} pages  ")
    _ = text.append(f"preempted {counts['preemptions']}")
    if now.slots["total"]:
        used = now.slots["total"] - now.slots["free"]
        _ = text.append(
            f"  host {used} of {now.slots['total']} pages, {counted(counts['tickets'], 'copy', 'copies')} running"
        )
    return text


def _ranks(frame: Frame) -> list[Text]:
    """A line for each process of a model that is cut over several."""
    now, before = frame.picture, frame.before
    passed = 0.0 if before is None else now.clock - before.clock
    earlier = {} if before is None else {rank.rank: rank for rank in before.ranks}
    lines: list[Text] = []
    for rank in now.ranks:
        of = f"  dp {rank.dp}" if now.dp else ""
        text = Text(f"rank {rank.rank}{of}  process {rank.pid}  {rank.memory / 1e9:.1f} GB", no_wrap=True)
        old = earlier.get(rank.rank)
        if rank.waited is not None and old is not None and old.waited is not None and passed > 0:
            share = min(1.0, max(0.0, (rank.waited - old.waited) / passed))
            _ = text.append(f"  waits for others {share:.0%} of the time")
        lines.append(text)
    return lines


def _dp(picture: wire.Picture) -> list[Text]:
    """A line for each of several schedulers."""
    lines: list[Text] = []
    for number, one in enumerate(picture.dp):
        counts, pages = one.counts, one.pages
        work = ", ".join(f"{counts[name]} {name}" for name in ("queued", "prefilling", "decoding") if counts[name])
        text = f"dp {number}  {counted(counts['sessions'], 'session')}{f': {work}' if work else ''}"
        text += f"  {pages['free'] + pages['cached']} of {sum(pages.values())} pages free or cached"
        lines.append(Text(text, no_wrap=True, overflow="ellipsis"))
    return lines


def _pages(picture: wire.Picture) -> Text:
    total = sum(picture.pages.values())
    text = Text(f"{counted(total, 'page')} ", no_wrap=True, overflow="ellipsis")
    for owner, cells in _cells(picture.pages, total):
        mark, style = _OWNERS[owner]
        _ = text.append(mark * cells, style=style)
    for owner, (_, style) in _OWNERS.items():
        if picture.pages.get(owner):
            _ = text.append(f"  {picture.pages[owner]} ").append(owner, style=style)
    return text


def _cells(pages: dict[str, int], total: int) -> Iterator[tuple[str, int]]:
    """Cells of the bar for each owner: they add up to the bar, whatever is rounded."""
    end = done = 0
    for owner in _OWNERS:
        end += pages.get(owner, 0)
        cells = round(_BAR_CELLS * end / total) - done if total else 0
        done += cells
        yield owner, cells


def _tenants(picture: wire.Picture) -> list[Text]:
    """Who has what of its quota, fullest first; nothing where there is no quota."""
    if picture.tenant_quota is None or not picture.tenants:
        return []
    fullest = sorted(picture.tenants.items(), key=lambda item: (-item[1], item[0]))
    told = "  ".join(f"{printable(tenant) or 'no name'} {pages}" for tenant, pages in fullest)
    return [Text(f"pages by tenant, of {picture.tenant_quota} each: {told}", no_wrap=True, overflow="ellipsis")]


def _queue(picture: wire.Picture) -> list[Text]:
    waiting = sorted(
        (view.age, view)
        for session in picture.sessions
        for view in session.branches
        if view.state == "Queued" and view.age is not None
    )
    if not picture.counts["queued"]:
        return []
    names = ", ".join(f"{view.branch} ({_seconds(view.since)})" for _, view in waiting[:8])
    left = picture.counts["queued"] - min(len(waiting), 8)
    more = f"{' + ' if names else ''}{left} more" if left else ""
    return [Text(f"queue, oldest first: {names}{more}", style="yellow", no_wrap=True, overflow="ellipsis")]


def _table(picture: wire.Picture, width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=False, header_style="bold")
    widest = {"branch": min(28, max(20, width // 4))} | ({} if width >= _WIDE else {"where its rows are": 24})
    for name, justify, gives_way in _COLUMNS:
        if name != "tail" or width >= _WIDE:
            stays = not gives_way or (name == "branch" and width >= _COMMON)  # a session's id is not to be cut
            table.add_column(_cut(name), justify=justify, no_wrap=stays, max_width=widest.get(name))
    for row in rows_of(picture):
        state = Text(row.state, style=_STATE_STYLES.get(row.state, ""))
        tail = [row.tail] if width >= _WIDE else []
        table.add_row(_cut(row.name), state, row.known, _cut(row.rows), *tail, row.lease, _cut(row.note))
    return table


def _cut(text: str) -> Text:
    """Loses its end in a column that gives way, instead of going on below."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def shares(wanted: Sequence[int], total: int) -> list[int]:
    """Lines of a screen for blocks that want so many: who wants little gets it, the others share what is left."""
    given = [0] * len(wanted)
    for done, place in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        given[place] = min(wanted[place], max(0, total) // (len(wanted) - done))
        total -= given[place]
    return given


def as_data(frame: Frame) -> dict[str, Any]:
    """The same for programs: plain values by name."""
    welcome = frame.welcome
    picture = frame.picture
    return {
        "socket": frame.socket,
        "silent_seconds": frame.silent,
        "pid": welcome.pid,
        "model": welcome.model,
        "source": welcome.source,
        "page_tokens": welcome.page_tokens,
        "clock": picture.clock,
        "pages": picture.pages,
        "slots": picture.slots,
        "counts": picture.counts,
        "tenants": picture.tenants,
        "tenant_quota": picture.tenant_quota,
        "ranks": [_named(rank) for rank in picture.ranks],
        "dp": [_named(one) for one in picture.dp],
        "sessions": [_named(session) for session in picture.sessions],
    }


def _named(value: Any) -> Any:
    """Structs as objects: on the wire they are arrays."""
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    return [_named(item) for item in value] if isinstance(value, tuple) else value
