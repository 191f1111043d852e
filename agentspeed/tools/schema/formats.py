"""What a string's `format` may look like: patterns that a grammar can follow, and that always come to an end.

They are narrower than the standards where Python's own types are (no second 60, no year 0).
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


_UUIDS: Final = {f"uuid{version}": _uuid(version) for version in range(1, 9)}
_SPELT_OUT: Final[dict[str, str]] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "base64": "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64url": "([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
    **_UUIDS,
}
_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"({_OCTET}\.){{3}}{_OCTET}"
_GROUP: Final = "[0-9a-fA-F]{1,4}"
_IPV6: Final = "|".join(
    [f"({_GROUP}:){{7}}{_GROUP}", f"::({_GROUP}(:{_GROUP}){{0,6}})?"]
    + [f"({_GROUP}:){{{before}}}(:{_GROUP}){{1,{7 - before}}}" for before in range(1, 7)]
    + [f"({_GROUP}:){{1,7}}:", rf"::(ffff:)?{_IPV4}", rf"({_GROUP}:){{6}}{_IPV4}"]
)
_LABEL: Final = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME: Final = rf"{_LABEL}(\.{_LABEL})*"
_MAILBOX: Final = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_ESCAPED: Final = "%[0-9A-Fa-f]{2}"
_UNRESERVED: Final = "A-Za-z0-9._~!$&'()*+,;="
_BEYOND_ASCII: Final = r"\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef"


def _address(more: str = "") -> tuple[str, str]:
    """A URI, or an IRI where `more` characters may stand, and the forms without a scheme."""
    char = rf"([{_UNRESERVED}:@{more}-]|{_ESCAPED})"
    no_colon = rf"([{_UNRESERVED}@{more}-]|{_ESCAPED})"
    host = rf"(\[({_IPV6})\]|([{_UNRESERVED}{more}-]|{_ESCAPED})*)"
    authority = rf"//(([{_UNRESERVED}:{more}-]|{_ESCAPED})*@)?{host}(:[0-9]*)?(/{char}*)*"
    rooted = rf"/({char}+(/{char}*)*)?"
    after = rf"(\?({char}|[/?])*)?(#({char}|[/?])*)?"
    whole = rf"[A-Za-z][A-Za-z0-9+.-]*:({authority}|{rooted}|{char}+(/{char}*)*)?{after}"
    return whole, rf"({whole}|({authority}|{rooted}|{no_colon}+(/{char}*)*)?{after})"


_URI, _URI_REFERENCE = _address()
_IRI, _IRI_REFERENCE = _address(_BEYOND_ASCII)
_VARIABLE: Final = rf"([A-Za-z0-9_]|{_ESCAPED})(\.?([A-Za-z0-9_]|{_ESCAPED}))*(\*|:[1-9][0-9]{{0,3}})?"
_TEMPLATE: Final = rf"([{_UNRESERVED}:/?#\[\]@-]|{_ESCAPED}|\{{[+#./;?&]?{_VARIABLE}(,{_VARIABLE})*\}})*"
_POINTER: Final = "(/([^~/]|~[01])*)*"
_SPELT_OUT.update(
    {
        "email": rf"{_MAILBOX}(\.{_MAILBOX})*@{_HOSTNAME}",
        "hostname": _HOSTNAME,
        "ipv4": _IPV4,
        "ipv6": _IPV6,
        "uri": _URI,
        "uri-reference": _URI_REFERENCE,
        "uri-template": _TEMPLATE,
        "iri": _IRI,
        "iri-reference": _IRI_REFERENCE,
        "json-pointer": _POINTER,
        "relative-json-pointer": rf"(0|[1-9][0-9]{{0,8}})(#|{_POINTER})",
        "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    }
)
PATTERNS: Final = {name: f"^({pattern})$" for name, pattern in _SPELT_OUT.items()}
"""What such a pattern accepts, Python's own type accepts too."""

KNOWN: Final = frozenset(PATTERNS)
"""Every other format is, as JSON Schema has it, for people: any text of a bounded length."""

ENDING: Final = KNOWN & {"date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid", *_UUIDS}
"""Those that end by themselves; every other is given a length."""
