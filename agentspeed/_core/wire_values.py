"""What the engine says in the words of the protocol, as the values that users read."""

from __future__ import annotations

from types import MappingProxyType

from agentspeed.transport.base import wire
from agentspeed.usage import EngineStats, Inspection, Lease, Residence, Usage


def lease_of(lease: wire.Lease) -> Lease:
    """The engine's promise about a branch at rest."""
    return Lease(keep=lease.keep, seconds=lease.seconds, why=lease.why, residence=residence_of(lease.residence))


def residence_of(residence: wire.Residence) -> Residence:
    """Where the rows of a branch are."""
    return Residence(device=residence.device, host=residence.host, lost=residence.lost)


def inspection_of(seen: wire.Inspected) -> Inspection:
    """What the engine says of a branch."""
    return Inspection(
        state=seen.state,
        known=seen.known,
        residence=residence_of(seen.residence),
        lease=None if seen.lease is None else lease_of(seen.lease),
        waiting_for=seen.waiting_for,
        tenant_pages=seen.tenant_pages,
        tenant_quota=seen.tenant_quota,
    )


def stats_of(stats: wire.Stats) -> EngineStats:
    """What the engine counts."""
    return EngineStats(
        counts=MappingProxyType(stats.counts),
        seconds=MappingProxyType(stats.seconds),
        dp=tuple(MappingProxyType(one) for one in stats.dp),
    )


def usage_of(usage: wire.TurnUsage) -> Usage:
    """The engine's account of one turn."""
    return Usage(
        new=usage.new,
        resumed_device=usage.resumed_device,
        resumed_host=usage.resumed_host,
        recomputed=usage.recomputed,
        shared=usage.shared,
        drawn=usage.drawn,
        preempted=usage.preempted,
        turns=1,
        queue_seconds=usage.queue_seconds,
        prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds,
        why=usage.why,
    )
