"""The engine's frames, handed on to what relays them: nothing above `transport` imports the engine's packages."""

from agentspeed_engine.protocol.frames import BadFrame, command_reader, encode_command, outbox_reader

__all__ = ["BadFrame", "command_reader", "encode_command", "outbox_reader"]
