"""Bounds that more than one search has: what lies in them beside the usual."""

from __future__ import annotations

from dataclasses import replace

from tests.modelcheck.explorer import Bounds

HOST = Bounds(verbs=3, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1)))
LOADED = Bounds(verbs=2, host_slots=4, branches=3, setup=HOST.setup, turns=(1, 2))
"""From where the rows of the first session are on the host alone: commands meet its turn while they come back."""
QUOTA = Bounds(
    verbs=2, pages=14, page_tokens=1, context_limit=8, tenant_pages=8, branches=3, setup=((1,), (1, 2), (2, 1))
)
"""Two sessions of one tenant, whose prompts fit its quota and whose answers do not, and one of another."""
PLACES = Bounds(verbs=3, turns_in_place=2, branches=3, pages=5, setup=((1, 1, 1), (2, 1, 1)), turns=(1, 2))
"""Branches whose next turns go before others that wait, and whose rows make no room for those."""
PLACES_OF_FORKS = Bounds(verbs=3, turns_in_place=4, branches=2, pages=5, context_limit=8, most=5, setup=((1, 1),))
"""Two branches of one session are at one place, and their answers do not fit beside each other."""
AHEAD = Bounds(verbs=3, depth=1, decode_ahead=True)
"""A row is issued while the token it is fed with is in flight."""
AHEAD_TWO = Bounds(verbs=2, depth=1, decode_ahead=True, pages=5, context_limit=8, most=5, setup=((1,), (2, 1)))
"""Two turns run ahead at once, and their answers do not fit beside each other."""
AHEAD_FAR = Bounds(verbs=2, depth=2, decode_ahead=True, pages=5, context_limit=8, most=5)
"""Three steps in flight: there would be room for a second row whose token is not known."""
PREPARED = Bounds(verbs=4, prepares=True)
"""Turns that wait to be prepared."""
SPOILT = Bounds(verbs=3, depth=1, spoils=True)
"""What a turn computes may be no finite numbers."""
SPOILT_LOADED = replace(LOADED, spoils=True)
"""Also of rows that come back from the host."""
SPOILT_SAVED = Bounds(
    verbs=2, pages=8, context_limit=12, host_slots=8, setup=((1,) * 6, (2, *(1,) * 5)), turns=(1, 2), spoils=True
)
"""Also while rows are copied there: free pages are few, so those at rest are saved before any are needed."""
SPOILT_SHARED = Bounds(verbs=2, pages=6, setup=((1, 1, 1), (1, 1, 2)), turns=(1,), spoils=True)
"""Two sessions begin with the same page."""
