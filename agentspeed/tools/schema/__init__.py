"""From a JSON schema to a grammar whose every text is an instance of it: read, taken apart, planned, written."""

from agentspeed.tools.schema.bounds import DEFAULT_BOUNDS, Bounds
from agentspeed.tools.schema.compiling import (
    Compiled,
    Entry,
    EntryKinds,
    Wording,
    compile_entries,
    compile_schema,
    entry_kinds,
)
from agentspeed.tools.schema.values import Json, Schema

__all__ = [
    "DEFAULT_BOUNDS",
    "Bounds",
    "Compiled",
    "Entry",
    "EntryKinds",
    "Json",
    "Schema",
    "Wording",
    "compile_entries",
    "compile_schema",
    "entry_kinds",
]
