"""Names of things inside the engine, one type per kind, so that a page can never be passed for a slot.

`NewType` catches a wrong argument and a wrong assignment, not arithmetic; arithmetic on page and token counts
therefore lives in the two functions below.
"""

from __future__ import annotations

from typing import NewType

LinkId = NewType("LinkId", int)
"""One connected front."""
BranchId = NewType("BranchId", int)
SessionId = NewType("SessionId", int)
"""The id of the branch that `Open` made; forked branches share it."""
NodeId = NewType("NodeId", int)
PageId = NewType("PageId", int)
"""A device page: `page_tokens` KV rows of every layer."""
SlotId = NewType("SlotId", int)
"""A host slot: room for one page in host memory."""
TicketId = NewType("TicketId", int)
StepSeq = NewType("StepSeq", int)


def pages_for(tokens: int, page_tokens: int) -> int:
    """How many pages `tokens` rows fill, the last one perhaps partly."""
    return -(-tokens // page_tokens)


def page_floor(tokens: int, page_tokens: int) -> int:
    """The largest multiple of a page that is not above `tokens`."""
    return tokens - tokens % page_tokens
