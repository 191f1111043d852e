"""Sessions over HTTP: the endpoints that OpenAI's and Anthropic's clients speak, over one engine and its sessions."""

from __future__ import annotations

from agentspeed.server.options import ApiKey, ServerOptions
from agentspeed.server.serving import Server

__all__ = ["ApiKey", "Server", "ServerOptions"]
