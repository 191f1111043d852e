"""The `agentspeed` command. Its parts are imported when it runs, so that `import agentspeed` stays small."""

from __future__ import annotations

import sys

from agentspeed.cli.terminal_text import decodable, encodable


def main() -> None:
    """Entry point of the console script."""
    try:
        from agentspeed.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"The command needs {error.name}. Install agentspeed[cli].", file=sys.stderr)
        sys.exit(2)
    encodable(sys.stdout)
    decodable(sys.stdin)
    app()
