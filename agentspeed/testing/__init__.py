"""For tests of code that uses agentspeed: an engine that says what a script says, below all that is real."""

from agentspeed.testing.scripted import ScriptedEngine, Turn, say, tool_call
from agentspeed.testing.scripted_model import ScriptedText

__all__ = ["ScriptedEngine", "ScriptedText", "Turn", "say", "tool_call"]
