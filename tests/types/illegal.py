"""Calls that must stay type errors. Never run: each coded ignore becomes an error itself the day its call is legal."""

from __future__ import annotations

from agentspeed_engine.ids import PageId, SlotId
from agentspeed_engine.kv.branch import Room
from agentspeed_engine.kv.branch_states import Closed, Decoding, Held, Prefilling, Queued, Settling, Then
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.node_states import Device, Host, Loading


def a_branch_at_rest_has_no_room(held: Held, queued: Queued) -> None:
    _ = held.room  # type: ignore[attr-defined]
    _ = queued.room  # type: ignore[attr-defined]


def nothing_is_released_while_rows_are_in_flight(settling: Settling, kv: KvCache) -> None:
    settling.close(kv, 0.0)  # type: ignore[attr-defined]
    settling.rewind(kv, 0)  # type: ignore[attr-defined]


def leaving_may_end_in_settling(prefilling: Prefilling, kv: KvCache, then: Then) -> Held:
    return prefilling.leave(kv, then, 0.0)  # type: ignore[return-value]


def only_a_queued_turn_is_admitted(held: Held, decoding: Decoding, room: Room) -> None:
    held.admit(room)  # type: ignore[attr-defined]
    decoding.admit(room)  # type: ignore[attr-defined]


def closed_is_the_end(closed: Closed, kv: KvCache) -> None:
    closed.close(kv, 0.0)  # type: ignore[attr-defined]


def rows_on_the_host_cannot_be_read(host: Host, loading: Loading) -> None:
    _ = host.pages  # type: ignore[attr-defined]
    loading.drop()  # type: ignore[attr-defined]


def a_slot_is_no_page(slots: tuple[SlotId, ...], pages: tuple[PageId, ...]) -> None:
    _ = Device(slots)  # type: ignore[arg-type]
    _ = Host(pages)  # type: ignore[arg-type]
