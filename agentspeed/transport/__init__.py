"""The way to an engine: the port, its implementations, and the border where engine codes become public errors."""
