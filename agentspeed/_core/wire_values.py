"""What the engine says in the words of the protocol, as the values that users read."""

from __future__ import annotations

from agentspeed.transport.base import wire
from agentspeed.usage import Lease, Residence, Usage


def lease_of(lease: wire.Lease) -> Lease:
    """The engine's promise about a branch at rest."""
    return Lease(keep=lease.keep, seconds=lease.seconds, why=lease.why, residence=residence_of(lease.residence))


def residence_of(residence: wire.Residence) -> Residence:
    """Where the rows of a branch are."""
    return Residence(device=residence.device, host=residence.host, lost=residence.lost)


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
