"""A machine as a cost model sees it, and what a step takes there by that model. Pure; no figure here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.spmd.experts import Exchange


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Alike GPUs, each linked to every other alike."""

    name: str
    gpus: int
    memory: int
    """Bytes of one GPU."""
    bandwidth: float
    """Bytes a second that a GPU reads of its own memory."""
    flops: float
    """A second, of one GPU, in bfloat16."""
    link: float
    """Bytes a second that a GPU sends to others."""
    launch: float
    """Seconds that a collective takes however little it carries."""

    def seconds(self, *, read: float, flops: float, sent: float, launches: int) -> float:
        """Of one step of one rank: memory and arithmetic overlap, what is sent does not."""
        return max(read / self.bandwidth, flops / self.flops) + sent / self.link + launches * self.launch


_LAUNCH = 20e-6
"""Of an NCCL all-reduce of few rows among the GPUs of one host: 23 µs are told of in decode (torchtitan), 9 of a
kernel made for it (sglang #2904)."""
MACHINES: dict[str, Machine] = {
    one.name: one
    for one in (
        Machine(name="h100", gpus=8, memory=80 * 10**9, bandwidth=3.35e12, flops=989e12, link=450e9, launch=_LAUNCH),
        Machine(name="h200", gpus=8, memory=141 * 10**9, bandwidth=4.8e12, flops=989e12, link=450e9, launch=_LAUNCH),
    )
}
"""By the vendor's data sheets: dense bfloat16, and NVLink in one direction."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One mesh for a model on a machine, and what the cost model says of it."""

    tp: int
    dp: int
    ep: int
    exchange: Exchange
    refused: str
    """Why it cannot be; empty where it can."""
    weight_bytes: int
    sessions: int
    """That fit on all dp ranks together, of those asked for."""
    step_seconds: float
    """Of one token of each of them."""
    sent_share: float
    """The part of the step that ranks send each other."""

    @property
    def tokens_per_second(self) -> float:
        return self.sessions / self.step_seconds if self.step_seconds else 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MeshChoice:
    """The meshes of all GPUs of a machine, the best first."""

    machine: Machine
    context: int
    """Tokens of every session."""
    wanted_sessions: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """None where no mesh can be."""
        return next((one for one in self.candidates if not one.refused), None)
