"""What owns something gives it away once, and says so when it is looked at afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import PageId, SlotId, TicketId
from agentspeed_engine.kv.linear import UseAfterMove
from agentspeed_engine.kv.node_states import Device, Host

PAGES = (PageId(1), PageId(2))


def test_what_was_moved_out_is_looked_at_and_moved_no_second_time() -> None:
    device = Device(PAGES)
    assert device.pages == PAGES
    saving = device.save((SlotId(1), SlotId(2)), TicketId(1))
    assert saving.pages == PAGES
    with pytest.raises(UseAfterMove, match="Device"):
        _ = device.pages
    with pytest.raises(UseAfterMove, match="Device"):
        _ = device.drop()
    assert not hasattr(device, "__setstate__")  # not a look at what it owns


def test_an_owner_has_no_verb_of_another_state_and_is_not_copied() -> None:
    host: Any = Host((SlotId(1),))
    assert host.slots == (SlotId(1),)
    with pytest.raises(AttributeError, match="'Host' object has no attribute 'save'"):
        host.save((), TicketId(1))
    with pytest.raises(BrokenInvariant, match="cannot be copied"):
        _ = copy.copy(host)
