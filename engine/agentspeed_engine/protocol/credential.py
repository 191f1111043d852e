"""The secret that a client shows in its greeting and an engine asks for: one file, named to both by a variable.

Without the variable an engine asks for none: its socket is reached by its owner alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from agentspeed_engine.protocol.codes import EngineFault

CREDENTIAL_FILE: Final = "AGENTSPEED_CREDENTIAL_FILE"


def credential(environment: Mapping[str, str]) -> str:
    """The text of the file without white space around it; empty where no file is named. Raises `EngineFault`
    (bad_credential) for a file that cannot be read or says nothing."""
    name = environment.get(CREDENTIAL_FILE)
    if not name:
        return ""
    remedy = f"Write a secret into it, or unset {CREDENTIAL_FILE}."
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineFault("bad_credential", f"{CREDENTIAL_FILE} names {name}: {error}.", remedy) from error
    if not text:
        raise EngineFault("bad_credential", f"{CREDENTIAL_FILE} names {name}, which is empty.", remedy)
    return text
