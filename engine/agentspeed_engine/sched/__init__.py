"""The scheduler: sans-IO, `handle(command)`, `plan(now)`, `apply(result)`."""
