"""Workload files: what agents do, on which engine, under which faults. A malformed one is refused by file and key."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.policy import POLICIES
from tests.simulation.marks import MARKS

FOLDER = Path(__file__).parent / "workloads"
VOCABULARY = 509

AGENT_KINDS = ("tool_user", "brancher", "parent", "arrivals")
FAULT_KINDS = (
    "abort",
    "client_gone",
    "tool_never_returns",
    "famine",
    "copy_fails",
    "copy_late",
    "rank_dies",
    "clock_jumps",
    "engine_killed",
    "turn_refused",
    "turn_spoilt",
)
KEEPS = ("none", "soft", "firm")
_WEDGES = "pin"
"""The policy that keeps what it keeps for ever: only benchmarks compare with it."""

T = TypeVar("T")


class WorkloadError(ValueError):
    """A workload file that cannot be run: which file, which key, what to do."""

    def __init__(self, file: str, key: str, what: str, remedy: str) -> None:
        super().__init__(f"{file}: {key}: {what} {remedy}")
        self.file = file
        self.key = key
        self.remedy = remedy


@final
@dataclass(frozen=True, slots=True)
class Span:
    """A number drawn evenly from `low` to `high`."""

    low: float
    high: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """The core's limits; every key is one of `CoreConfig`."""

    pages: int
    context_limit: int
    page_tokens: int = 4
    prefill_chunk: int = 16
    extend_tokens: int = 8
    depth: int = 0
    decode_ahead: bool = False
    host_slots: int = 0
    firm_pages: int | None = None
    max_sessions: int = 1024
    max_branches: int = 256
    max_waiting: int = 4096
    ticket_deadline: float = 5.0
    max_lease_seconds: float = 3600.0
    tenant_pages: int | None = None
    tenant_sessions: int | None = None
    turns_in_place: int = 1
    policy: str = "next_use"

    def config(self) -> CoreConfig:
        """Copies are cheap beside prefill here, so that the host tier is used."""
        return CoreConfig(
            vocab_size=VOCABULARY,
            copy_seconds_per_token=1e-4,
            recompute_seconds_per_token=1e-3,
            **{one.name: getattr(self, one.name) for one in dataclasses.fields(self)},
        )

    def undisturbed(self) -> EngineSpec:
        """Room for everybody, and nothing to refuse but what is too long for the model."""
        return dataclasses.replace(
            self,
            pages=self.pages * 64,
            host_slots=0,
            firm_pages=0,
            max_sessions=1 << 20,
            max_branches=1 << 20,
            max_waiting=1 << 20,
            tenant_pages=None,
            tenant_sessions=None,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """How long things take, in virtual seconds."""

    step: Span = Span(0.01, 0.05)
    copy: Span = Span(0.01, 0.5)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """Some agents that do the same kind of thing."""

    kind: str
    name: str = ""
    count: int = 1
    start: Span = Span(0, 0)
    """When each begins."""
    turns: Span = Span(2, 4)
    prompt: Span = Span(8, 24)
    """Ids of its first message."""
    sent: Span = Span(1, 6)
    """Ids of a later message or a tool's result."""
    drawn: Span = Span(1, 8)
    stops: int = 0
    """Ids below this one end a turn, of a vocabulary of 509."""
    pause: Span = Span(0.1, 2.0)
    """How long its tools take."""
    keep: str = "none"
    """What it asks of the engine for a pause."""
    children: Span = Span(2, 3)
    live: bool = False
    """Branch while a turn runs."""
    private: bool = False
    tenant: str = ""
    shared: int = 0
    """Ids at the front of its prompt that all agents have in common."""
    every: float = 0.2
    """Seconds between arrivals."""
    most: int = 200
    """Arrivals, at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSpec:
    """One kind of thing that goes wrong."""

    kind: str
    rate: float = 0.0
    """Chance at each point where it may strike."""
    at: tuple[int, ...] = ()
    """Points at which it strikes for certain, counted from 0."""
    most: int = 1_000_000
    seconds: Span = Span(1, 10)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What a workload is there to reach."""

    marks: tuple[str, ...] = ()
    """Rare paths that its seeds together must take."""
    longest_turn: float | None = None
    """Virtual seconds after which an unfinished turn counts as starved."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One file."""

    name: str
    why: str
    horizon: float = 600.0
    """Virtual seconds by which every agent is done."""
    engine: EngineSpec
    device: DeviceSpec = DeviceSpec()
    agents: tuple[AgentSpec, ...]
    faults: tuple[FaultSpec, ...] = ()
    expect: Expectations = Expectations()

    def undisturbed(self) -> Workload:
        """The same agents where nothing goes wrong."""
        return dataclasses.replace(
            self, engine=self.engine.undisturbed(), faults=(), horizon=self.horizon * 10, expect=Expectations()
        )


def names() -> tuple[str, ...]:
    """The workloads that ship with the project."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load(name_or_path: str) -> Workload:
    """A shipped workload by its name, or any file. Raises `WorkloadError`."""
    path = Path(name_or_path) if name_or_path.endswith(".toml") else FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise WorkloadError(path.name, "(file)", "There is no such workload.", f"One of: {', '.join(names())}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkloadError(path.name, "(file)", f"This is not UTF-8: {error}.", "Save it as UTF-8.") from error
    return parsed(text, path.name)


def parsed(text: str, file: str) -> Workload:
    """Raises `WorkloadError` naming the first key that is wrong."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WorkloadError(file, "(syntax)", f"This is not TOML: {error}.", "Correct that line.") from error
    reader = _Reader(file)
    workload = reader.record(Workload, table, "")
    reader.judge(workload)
    return workload


@final
@dataclass(slots=True)
class _Reader:
    """Turns tables into records, by the annotations of their fields."""

    file: str
    nested: Mapping[str, type] = field(
        default_factory=lambda: {"EngineSpec": EngineSpec, "DeviceSpec": DeviceSpec, "Expectations": Expectations}
    )
    listed: Mapping[str, type] = field(
        default_factory=lambda: {"tuple[AgentSpec, ...]": AgentSpec, "tuple[FaultSpec, ...]": FaultSpec}
    )

    def record(self, kind: type[T], table: Mapping[str, Any], where: str) -> T:
        fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for key in table:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, 1)
                remedy = f"Do you mean {close[0]!r}?" if close else f"Known keys: {', '.join(fields)}."
                raise self.wrong(where + key, "There is no such key.", remedy)
        values: dict[str, Any] = {}
        for name, one in fields.items():
            if name in table:
                values[name] = self.value(str(one.type), table[name], where + name)
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise self.wrong(where + name, "This key is missing.", "Add it.")
        return kind(**values)

    def value(self, annotation: str, value: Any, where: str) -> Any:
        if annotation in self.nested:
            if not isinstance(value, dict):
                raise self.wrong(where, "This is no table.", f"Write [{where}].")
            return self.record(self.nested[annotation], value, where + ".")
        if annotation in self.listed:
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise self.wrong(where, "This is no list of tables.", f"Write [[{where}]].")
            return tuple(
                self.record(self.listed[annotation], one, f"{where}[{index}].") for index, one in enumerate(value)
            )
        return self.plain(annotation, value, where)

    def plain(self, annotation: str, value: Any, where: str) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match annotation:
            case "int" | "int | None" if isinstance(value, int) and number:
                return self.at_least_0(value, where)
            case "float" | "float | None" if number:
                return float(self.at_least_0(value, where))
            case "str" if isinstance(value, str):
                return value
            case "bool" if isinstance(value, bool):
                return value
            case "Span":
                return self.span(value, where)
            case "tuple[int, ...]" if isinstance(value, list) and all(type(one) is int for one in value):
                return tuple(value)
            case "tuple[str, ...]" if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return tuple(value)
            case _:
                raise self.wrong(where, f"{value!r} does not fit.", f"Give: {annotation}.")

    def span(self, value: Any, where: str) -> Span:
        both = value if isinstance(value, list) else [value, value]
        if len(both) != 2 or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in both):
            raise self.wrong(where, f"{value!r} is no span.", "Give a number, or [low, high].")
        low, high = both
        if low < 0 or high < low:
            raise self.wrong(where, f"{value!r} is no span.", "0 <= low <= high.")
        return Span(low, high)

    def at_least_0(self, value: Any, where: str) -> Any:
        if value < 0:
            raise self.wrong(where, f"{value!r} is negative.", "Give 0 or more.")
        return value

    def wrong(self, key: str, what: str, remedy: str) -> WorkloadError:
        return WorkloadError(self.file, key, what, remedy)

    def judge(self, workload: Workload) -> None:
        """What no single value shows."""
        if not workload.agents:
            raise self.wrong("agents", "Nobody does anything.", "Add an [[agents]] table.")
        for index, agent in enumerate(workload.agents):
            self.one_of(agent.kind, AGENT_KINDS, f"agents[{index}].kind")
            self.one_of(agent.keep, KEEPS, f"agents[{index}].keep")
        for index, fault in enumerate(workload.faults):
            self.one_of(fault.kind, FAULT_KINDS, f"faults[{index}].kind")
            if not 0 <= fault.rate <= 1:
                raise self.wrong(f"faults[{index}].rate", f"{fault.rate} is no chance.", "Give 0 to 1.")
            if fault.rate and fault.at:
                raise self.wrong(
                    f"faults[{index}].at",
                    "There is a rate too.",
                    "Give one of them, or another [[faults]] table for the other.",
                )
        for index, mark in enumerate(workload.expect.marks):
            self.one_of(mark, tuple(MARKS), f"expect.marks[{index}]")
        if workload.engine.policy == _WEDGES:
            raise self.wrong(
                "engine.policy",
                f"{_WEDGES!r} can wedge the pool.",
                f"One of: {', '.join(name for name in POLICIES if name != _WEDGES)}.",
            )
        try:
            workload.engine.config().check()
        except EngineFault as fault:
            raise self.wrong("engine", fault.message, fault.remedy) from fault

    def one_of(self, value: str, known: tuple[str, ...], where: str) -> None:
        if value not in known:
            raise self.wrong(where, f"{value!r} is unknown.", f"One of: {', '.join(known)}.")
