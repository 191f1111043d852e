"""What a string's `format` may look like: patterns that a grammar can follow, and that always come to an end.

The grammar library's own form is not used where it never ends (a duration, the fraction of a second) or lets through
what Python's type then refuses (second 60, the year 0).
"""

from __future__ import annotations

from typing import Final

_YEAR: Final = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR: Final = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_TO_28: Final = "(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TO_30: Final = "(0[13-9]|1[0-2])-(29|30)"
_TO_31: Final = "(0[13578]|1[02])-31"
_DATE: Final = f"({_YEAR}-({_TO_28}|{_TO_30}|{_TO_31})|{_LEAP_YEAR}-02-29)"

_HOUR_AND_MINUTE: Final = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME: Final = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_HOUR_AND_MINUTE})"

# Six digits each: the longest of all is still less than a `timedelta` holds.
_COUNT: Final = "[0-9]{1,6}"
_MINUTES: Final = f"{_COUNT}M({_COUNT}S)?"
_CLOCK: Final = f"T({_COUNT}H({_MINUTES})?|{_MINUTES}|{_COUNT}S)"
_MONTHS: Final = f"{_COUNT}M({_COUNT}D)?"
_DURATION: Final = f"P({_COUNT}W|({_COUNT}Y({_MONTHS})?|{_MONTHS}|{_COUNT}D)({_CLOCK})?|{_CLOCK})"


def _uuid(version: int) -> str:
    return f"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"


_SPELT_OUT: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "base64": "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64url": "([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
    **{f"uuid{version}": _uuid(version) for version in range(1, 9)},
}
PATTERNS: Final = {name: f"^({pattern})$" for name, pattern in _SPELT_OUT.items()}
"""Spelt out here: what such a pattern accepts, Python's own type accepts too."""

OF_THE_GRAMMAR: Final = frozenset({"email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
"""Left to the grammar library."""

ENDING: Final = (PATTERNS.keys() | OF_THE_GRAMMAR) - {"base64", "base64url", "email", "hostname", "uri"}
"""Those that end by themselves; every other is given a length."""

PLAIN: Final = frozenset(
    {
        "binary",
        "directory-path",
        "file-path",
        "fraction",
        "idn-email",
        "idn-hostname",
        "ipv4interface",
        "ipv4network",
        "ipv6interface",
        "ipv6network",
        "ipvanyaddress",
        "ipvanyinterface",
        "ipvanynetwork",
        "iri",
        "iri-reference",
        "json-pointer",
        "multi-host-uri",
        "password",
        "path",
        "regex",
        "relative-json-pointer",
        "uri-reference",
        "uri-template",
        "zoneinfo",
    }
)
"""Any text of a bounded length; what else such a type asks for is checked once the value is there."""
